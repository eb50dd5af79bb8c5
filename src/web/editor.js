// The code editor: a textarea at once, CodeMirror in its place when it has loaded.
import { effect, html, untracked, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact.js";

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

function createView(cm, parent, { text, selection, language, label, readOnly, submit, save, changed }) {
  const languageSlot = new cm.Compartment();
  // While a text from outside is put in: that is no typing.
  let putting = false;
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
      doc: text,
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
        cm.EditorView.updateListener.of((update) => update.docChanged && !putting && changed(update.state.doc.toString())),
      ],
    }),
  });
  const within = (place) => Math.min(place, view.state.doc.length);
  view.dispatch({ selection: { anchor: within(selection.start), head: within(selection.end) } });
  return {
    view,
    setLanguage: (name) => view.dispatch({ effects: languageSlot.reconfigure(languageExtension(cm, name)) }),
    put: (whole) => {
      putting = true;
      try {
        view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: whole } });
      } finally {
        putting = false;
      }
    },
  };
}

/**
 * `text` is a signal, undefined once there is nothing to edit; `onChange(text)` reports typing, and has to set the signal at once.
 * `onSubmit` is Ctrl+Enter or Cmd+Enter, `onSave` with S.
 *
 * What is typed and what the signal says are brought together when either changes, never at a render: a render shows
 * a text that may be some key presses old, and to put that back would undo them.
 */
export function Editor({ text, language, label = "Code", readOnly = false, onChange, onSubmit, onSave = () => {} }) {
  const host = useRef(null);
  const field = useRef(null);
  const editor = useRef(null);
  /** The text that was typed or put in last: when the signal says the same, there is nothing to put in. */
  const own = useRef("");
  const [rich, setRich] = useState(false);
  // The editor outlives renders, its callbacks must be the newest.
  const latest = useRef({});
  latest.current = { language, onChange, onSubmit, onSave };
  const changed = (now) => {
    own.current = now;
    latest.current.onChange(now);
  };

  useLayoutEffect(() => effect(() => {
    const now = text.value;
    if (now === undefined || now === own.current) return;
    own.current = now;
    untracked(() => {
      if (editor.current) editor.current.put(now);
      else if (field.current) field.current.value = now;
    });
  }), [text]);
  useEffect(() => {
    let gone = false;
    loadCodeMirror().then((cm) => {
      if (gone) return;
      const focused = host.current.contains(document.activeElement);
      const { selectionStart: start, selectionEnd: end } = field.current;
      editor.current = createView(cm, host.current, {
        text: own.current,
        // Typing goes on where it was.
        selection: focused ? { start, end } : { start: 0, end: 0 },
        language: latest.current.language,
        label,
        readOnly,
        submit: () => latest.current.onSubmit(),
        save: () => latest.current.onSave(),
        changed,
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

  const keys = (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    const doing = { Enter: onSubmit, s: onSave }[event.key];
    if (!doing) return;
    event.preventDefault();
    doing();
  };
  return html`
    <div class="editor" ref=${host} data-editor=${rich ? "codemirror" : "plain"}>
      ${!rich && html`<textarea ref=${field} aria-label=${label} readonly=${readOnly} spellcheck="false" autocapitalize="off" autocomplete="off" wrap="off"
        onInput=${(event) => changed(event.currentTarget.value)} onKeyDown=${keys}></textarea>`}
    </div>
  `;
}
