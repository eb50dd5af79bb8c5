// The code editor: a textarea at once, CodeMirror in its place when it has loaded.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";

let loading = null;

function loadCodeMirror() {
  // A failed load is tried again with the next editor; the textarea works meanwhile.
  loading ??= import("./vendor/codemirror.js").catch((error) => {
    loading = null;
    throw error;
  });
  return loading;
}

function languageExtension(cm, language) {
  switch (language) {
    case "python":
      return [cm.python(), cm.indentUnit.of("    ")];
    case "node":
    case "nodejs":
    case "javascript":
      return [cm.javascript(), cm.indentUnit.of("  ")];
    case "typescript":
      return [cm.javascript({ typescript: true, jsx: true }), cm.indentUnit.of("  ")];
    default:
      return modeExtension(cm, language);
  }
}

/** Names that differ from the mode's. */
const MODES = { bash: "shell", sh: "shell", "c++": "cpp" };
/** Where indenting by two is not the custom. */
const INDENTS = { go: "\t", rust: "    ", c: "    ", cpp: "    ", java: "    ", perl: "    " };

function modeExtension(cm, language) {
  const name = MODES[language] ?? language;
  const mode = Object.hasOwn(cm.modes, name) ? cm.modes[name] : null;
  return mode ? [cm.StreamLanguage.define(mode), cm.indentUnit.of(INDENTS[name] ?? "  ")] : [];
}

/** Colours come from the page's CSS variables, so the editor follows the theme without being rebuilt. */
function appearance(cm) {
  const { tags: t } = cm;
  const style = cm.HighlightStyle.define([
    { tag: [t.keyword, t.controlKeyword, t.operatorKeyword, t.definitionKeyword, t.moduleKeyword], color: "var(--code-keyword)" },
    { tag: [t.string, t.special(t.string), t.regexp], color: "var(--code-string)" },
    { tag: [t.number, t.bool, t.null, t.atom], color: "var(--code-number)" },
    { tag: [t.comment, t.lineComment, t.blockComment], color: "var(--code-comment)", fontStyle: "italic" },
    { tag: [t.function(t.variableName), t.function(t.definition(t.variableName)), t.className, t.standard(t.variableName)], color: "var(--code-name)" },
  ]);
  const theme = cm.EditorView.theme({
    "&": { height: "100%", backgroundColor: "var(--surface)", color: "var(--text)", fontSize: "13px" },
    ".cm-scroller": { fontFamily: "var(--mono)", lineHeight: "1.55" },
    ".cm-content": { caretColor: "var(--text)", padding: "10px 0" },
    ".cm-cursor": { borderLeftColor: "var(--text)" },
    ".cm-gutters": { backgroundColor: "var(--surface)", color: "var(--faint)", border: "none" },
    ".cm-activeLine, .cm-activeLineGutter": { backgroundColor: "var(--active-line)" },
    "&.cm-focused .cm-selectionBackground, .cm-selectionBackground, ::selection": { backgroundColor: "var(--selection) !important" },
    "&.cm-focused": { outline: "none" },
  });
  return [theme, cm.syntaxHighlighting(style)];
}

function createView(cm, parent, { value, language, label, readOnly, submit, save, changed }) {
  const languageSlot = new cm.Compartment();
  const run = () => {
    submit();
    return true;
  };
  const keep = () => {
    save();
    return true;
  };
  const view = new cm.EditorView({
    parent,
    state: cm.EditorState.create({
      doc: value,
      extensions: [
        cm.keymap.of([{ key: "Mod-Enter", run }, { key: "Ctrl-Enter", run }, { key: "Mod-s", run: keep }, cm.indentWithTab, ...cm.historyKeymap, ...cm.defaultKeymap]),
        cm.history(),
        cm.lineNumbers(),
        cm.highlightActiveLine(),
        cm.highlightActiveLineGutter(),
        cm.highlightSpecialChars(),
        cm.drawSelection(),
        cm.bracketMatching(),
        cm.indentOnInput(),
        languageSlot.of(languageExtension(cm, language)),
        appearance(cm),
        cm.EditorView.contentAttributes.of({ "aria-label": label, spellcheck: "false" }),
        cm.EditorState.readOnly.of(readOnly),
        cm.EditorView.updateListener.of((update) => update.docChanged && changed(update.state.doc.toString())),
      ],
    }),
  });
  return {
    view,
    setLanguage: (name) => view.dispatch({ effects: languageSlot.reconfigure(languageExtension(cm, name)) }),
    setText: (text) => view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: text } }),
  };
}

/** `value` may be changed from outside; `onChange(text)` reports typing; `onSubmit` is Ctrl+Enter or Cmd+Enter, `onSave` with S. */
export function Editor({ value, language, label = "Code", readOnly = false, onChange, onSubmit, onSave = () => {} }) {
  const host = useRef(null);
  const editor = useRef(null);
  const [rich, setRich] = useState(false);
  // The editor outlives renders, its callbacks must be the newest.
  const latest = useRef({});
  latest.current = { value, language, onChange, onSubmit, onSave };

  useEffect(() => {
    let gone = false;
    loadCodeMirror().then((cm) => {
      if (gone) return;
      const focused = host.current.contains(document.activeElement);
      editor.current = createView(cm, host.current, {
        value: latest.current.value,
        language: latest.current.language,
        label,
        readOnly,
        submit: () => latest.current.onSubmit(),
        save: () => latest.current.onSave(),
        changed: (text) => latest.current.onChange(text),
      });
      setRich(true);
      if (focused) editor.current.view.focus();
    }, (error) => console.warn("gantry: the editor did not load, a plain text field stays", error));
    return () => {
      gone = true;
      editor.current?.view.destroy();
      editor.current = null;
    };
  }, []);

  useEffect(() => {
    editor.current?.setLanguage(language);
  }, [language]);
  useEffect(() => {
    const now = editor.current?.view.state.doc.toString();
    if (now !== undefined && now !== value) editor.current.setText(value);
  }, [value]);

  const keys = (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    const doing = { Enter: onSubmit, s: onSave }[event.key];
    if (!doing) return;
    event.preventDefault();
    doing();
  };
  return html`
    <div class="editor" ref=${host} data-editor=${rich ? "codemirror" : "plain"}>
      ${!rich && html`<textarea aria-label=${label} readonly=${readOnly} spellcheck="false" autocapitalize="off" autocomplete="off" wrap="off"
        value=${value} onInput=${(event) => onChange(event.currentTarget.value)} onKeyDown=${keys}></textarea>`}
    </div>
  `;
}
