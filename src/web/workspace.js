// A repl from inside: its files, an editor, its program and what it prints, its page, its terminals.
import { html, signal, useEffect, useMemo, useRef, useState } from "./vendor/preact.js";
import { api } from "./api.js";
import { Editor } from "./editor.js";
import { FileTree } from "./file-tree.js";
import { OpenFiles, languageOf } from "./open-files.js";
import { OutputPane } from "./output.js";
import { POLL_MS, StateBadge, attempt, isIdle, isStopped, isWorkspace, stopRepl, unsavedWords } from "./repl-state.js";
import { kept } from "./kept.js";
import { href, replaceQuery, route } from "./router.js";
import { Runner } from "./runner.js";
import { Splitter, useShare } from "./splitter.js";
import { remembered } from "./storage.js";
import { Terminal } from "./terminal.js";
import { AppLink } from "./verdict.js";
import { Empty, ProblemNote, useLoaded } from "./ui.js";

/** From here on there is room for the program beside the editor. */
const WIDE_PX = 1_200;
/** Below this, parts stand one under the other, as panels.css has it. */
const NARROW = matchMedia("(max-width: 960px)");
const isNarrow = signal(NARROW.matches);
NARROW.addEventListener("change", (event) => { isNarrow.value = event.matches; });

/** What the page knows of one repl's inside. */
class Inside {
  constructor(replId) {
    this.runner = new Runner(replId);
    this.files = new OpenFiles(this.runner);
    /** Terminals with a tab, and what the lower part shows: `output`, `page` or a terminal's name with `>` before it. */
    this.tabs = signal([]);
    this.shown = signal("output");
    /** What the last save left out beside what the runner says: `[{path, reason}]`. */
    this.notKept = signal([]);
  }

  static of(replId) {
    const inside = kept.get(replId) ?? new Inside(replId);
    kept.set(replId, inside);
    return inside;
  }

  leave(replId) {
    this.runner.disconnect();
    if (this.files.dirty.peek().length) return;
    this.files.stopListening();
    kept.delete(replId);
  }
}

addEventListener("beforeunload", (event) => {
  if ([...kept.values()].some((inside) => inside.files.dirty.peek().length)) event.preventDefault();
});

const PROGRAM_WORDS = { starting: "starting", serving: "serving", unknown: "…" };
const PROGRAM_TONE = { starting: "live", serving: "ok", ended: "bad" };

function ProgramBadge({ program }) {
  const { state, exit_code: code, reason } = program;
  const words = state === "ended" ? (code === undefined ? `ended: ${reason}` : `ended, exit code ${code}`) : PROGRAM_WORDS[state];
  const tone = state === "ended" && code === 0 ? "quiet" : (PROGRAM_TONE[state] ?? "quiet");
  return html`<span class=${`badge ${tone}`} role="status" aria-label=${`The program is ${words}`} data-testid="program-state" data-state=${state}>${words}</span>`;
}

const CONNECTION_WORDS = { idle: "Not connected", connecting: "Connecting…", waiting: "Reconnecting…" };

function Head({ repl, inside, run, save, fail, reload }) {
  const { runner, files } = inside;
  const connection = runner.connection.value;
  const program = runner.program.value;
  const runs = program.state === "starting" || program.state === "serving";
  const mine = isWorkspace(repl);
  const away = connection !== "online";
  return html`
    <header class="workspace-head">
      <a class="back-link" href=${href("repls", repl.replId)} aria-label=${`${repl.replId}: state and releases`} title="State and releases">←</a>
      <h2 class="mono">${repl.replId}</h2>
      ${isStopped(repl) ? html`<${StateBadge} state=${repl.state} />` : html`<${ProgramBadge} program=${program} />`}
      ${!isStopped(repl) && away && html`<span class="connection waiting" role="status" data-testid="workspace-connection"><span class="dot" aria-hidden="true"></span>${CONNECTION_WORDS[connection]}</span>`}
      <span class="workspace-url">${repl.url && html`<${AppLink} url=${repl.url} />`}</span>
      <span class="spring"></span>
      ${mine && html`
        <button type="button" class="small" disabled=${away || !files.dirty.value.length} title="Ctrl+S" data-testid="save"
          onClick=${() => save()}>Save</button>
        ${runs && html`<button type="button" class="small stop" disabled=${away} data-testid="stop-program"
          onClick=${() => attempt(() => runner.ask("program.stop"), fail)}>Stop</button>`}
        <button type="button" class="small primary" disabled=${away} title="Ctrl+Enter" data-testid="run-program" onClick=${run}>${runs ? "Restart" : "Run"}</button>`}
      ${!isStopped(repl) && html`<button type="button" class="small danger-quiet" data-testid="stop-repl"
        onClick=${() => stopRepl(repl, fail).then(reload)}>Stop repl…</button>`}
    </header>
  `;
}

function FileTabs({ files, close }) {
  const shown = files.shown.value;
  return html`
    <div class="tabs" role="tablist" aria-label="Open files" onKeyDown=${walkTabs}>
      ${files.files.value.map(({ path, text, saved }) => html`
        <span key=${path} class=${`tab ${path === shown ? "chosen" : ""}`} role="presentation">
          <button type="button" role="tab" aria-selected=${path === shown ? "true" : "false"} tabindex=${path === shown ? "0" : "-1"} title=${path}
            aria-label=${path + (text === saved ? "" : ", not saved")} data-file=${path} data-dirty=${text !== saved} onClick=${() => files.show(path)}>
            ${path.slice(path.lastIndexOf("/") + 1)}${text !== saved && html` <span class="unsaved" aria-hidden="true">●</span>`}</button>
          <button type="button" class="tab-close" aria-label=${`Close ${path}`} tabindex=${path === shown ? "0" : "-1"} onClick=${() => close(path)}>×</button>
        </span>`)}
    </div>
  `;
}

/** Arrow keys go from tab to tab. */
function walkTabs(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.target.getAttribute("role") !== "tab") return;
  event.preventDefault();
  const tabs = [...event.currentTarget.querySelectorAll("[role=tab]")];
  const next = tabs[(tabs.indexOf(event.target) + by + tabs.length) % tabs.length];
  next.focus();
  next.click();
}

function Conflict({ file, files }) {
  if (!file.conflict) return null;
  return html`
    <div class="note bad conflict" role="alert" data-testid="conflict">
      <strong>${file.path} was changed by something else</strong>
      <p>What you typed is not saved. Take one of the two; the other is lost.</p>
      <button type="button" class="small" onClick=${() => files.takeTheirs(file.path)}>Take the changed file</button>
      <button type="button" class="small" onClick=${() => files.keepMine(file.path)}>Keep what I typed</button>
    </div>`;
}

function FileEditor({ files, path, readOnly, run, save }) {
  const text = useMemo(() => files.textOf(path), [files, path]);
  return html`<${Editor} text=${text} language=${languageOf(path)} label=${path} readOnly=${readOnly}
    onChange=${(now) => files.edit(path, now)} onSubmit=${run} onSave=${() => save(path)} />`;
}

function Editors({ inside, readOnly, run, save, fail }) {
  const { files } = inside;
  const shown = files.shown.value;
  const close = async (path) => {
    const file = files.files.peek().find((one) => one.path === path);
    if (file.text !== file.saved && !readOnly) {
      const saved = await attempt(() => files.save(path), fail);
      if (!saved) return;
    }
    files.close(path);
  };
  return html`
    <section class="editors" aria-label="Editor" data-part="editor">
      <${FileTabs} files=${files} close=${close} />
      ${files.files.value.map((file) => html`
        <div key=${file.path} class="editor-box" role="tabpanel" aria-label=${file.path} hidden=${file.path !== shown} data-editing=${file.path}>
          <${Conflict} file=${file} files=${files} />
          <${FileEditor} key=${readOnly} files=${files} path=${file.path} readOnly=${readOnly} run=${run} save=${save} />
        </div>`)}
      ${!shown && html`<${Empty} title="No file is open">Choose one among the files, or make one.<//>`}
    </section>
  `;
}

function AppFrame({ repl, serving }) {
  const [round, setRound] = useState(0);
  const served = useRef(serving);
  // It has just begun to listen: what shows is the page that stood in for it.
  useEffect(() => {
    if (serving && !served.current) setRound((n) => n + 1);
    served.current = serving;
  }, [serving]);
  return html`
    <div class="app-frame">
      <div class="app-frame-bar">
        <button type="button" class="small" onClick=${() => setRound((n) => n + 1)} data-testid="reload-page">Reload</button>
        <span class="mono muted">${repl.url}</span>
      </div>
      <iframe key=${round} src=${repl.url} title=${`The page of ${repl.replId}`} data-testid="app-frame"
        sandbox="allow-scripts allow-same-origin allow-forms allow-popups allow-modals allow-downloads"></iframe>
    </div>
  `;
}

function Dock({ repl, inside, fail }) {
  const { runner, tabs, shown } = inside;
  const there = runner.terminals.value;
  const now = shown.value;
  const serving = runner.program.value.state === "serving";
  const online = runner.connection.value === "online";
  // Terminals that another visit left are taken up.
  useEffect(() => {
    const missing = there.filter((name) => !tabs.peek().includes(name));
    if (missing.length) tabs.value = [...tabs.peek(), ...missing];
  }, [there]);
  const open = () => {
    const taken = new Set([...tabs.peek(), ...there]);
    let number = 1;
    while (taken.has(String(number))) number += 1;
    tabs.value = [...tabs.peek(), String(number)];
    shown.value = `>${number}`;
  };
  const close = async (name) => {
    if (runner.terminals.peek().includes(name) && !(await attempt(() => runner.ask("terminal.close", { terminal: name }), fail))) return;
    tabs.value = tabs.peek().filter((one) => one !== name);
    runner.terminals.value = runner.terminals.peek().filter((one) => one !== name);
    if (shown.peek() === `>${name}`) shown.value = tabs.peek().length ? `>${tabs.peek().at(-1)}` : "output";
  };
  const tab = (id, title, closes) => html`
    <span key=${id} class=${`tab ${id === now ? "chosen" : ""}`} role="presentation">
      <button type="button" role="tab" aria-selected=${id === now ? "true" : "false"} tabindex=${id === now ? "0" : "-1"} data-dock=${id}
        onClick=${() => { shown.value = id; }}>${title}</button>
      ${closes && html`<button type="button" class="tab-close" aria-label=${`Close ${title}`} tabindex=${id === now ? "0" : "-1"} onClick=${() => close(closes)}>×</button>`}
    </span>`;
  return html`
    <section class="dock" aria-label="Program and terminals" data-part="dock">
      <div class="dock-head">
        <div class="tabs" role="tablist" aria-label="Program and terminals" onKeyDown=${walkTabs}>
          ${tab("output", "Output")}
          ${tab("page", "Page")}
          ${tabs.value.map((name) => tab(`>${name}`, `Terminal ${name}`, name))}
        </div>
        <button type="button" class="small new-terminal" disabled=${!online} onClick=${open} data-testid="new-terminal">+ Terminal</button>
      </div>
      <div class="dock-body">
        <div role="tabpanel" aria-label="Output" class="dock-part" hidden=${now !== "output"}>
          <${OutputPane} name="output" buffer=${runner.output.value} placeholder="What the program prints shows up here." />
        </div>
        ${now === "page" && html`<div role="tabpanel" aria-label="Page" class="dock-part"><${AppFrame} repl=${repl} serving=${serving} /></div>`}
        ${tabs.value.map((name) => html`
          <div key=${name} role="tabpanel" aria-label=${`Terminal ${name}`} class="dock-part" hidden=${now !== `>${name}`}>
            <${Terminal} runner=${runner} name=${name} focused=${now === `>${name}`} fail=${fail} />
          </div>`)}
      </div>
    </section>
  `;
}

/** F6 goes from part to part, also out of a terminal, which takes every other key. */
function nextPart(event) {
  if (event.key !== "F6") return;
  event.preventDefault();
  const parts = [...event.currentTarget.querySelectorAll("[data-part]")];
  const at = parts.findIndex((part) => part.contains(document.activeElement));
  const next = parts[(at + (event.shiftKey ? -1 : 1) + parts.length) % parts.length];
  const visible = (element) => element.offsetParent !== null;
  const places = ["[role=treeitem][tabindex='0']", ".xterm-helper-textarea", ".cm-content", "textarea", "pre", "[role=tab][tabindex='0']", "button"];
  const found = places.map((place) => [...next.querySelectorAll(place)].find(visible)).find(Boolean);
  found?.focus();
}

function Body({ repl, inside, run, save, fail }) {
  const readOnly = !isWorkspace(repl);
  const [beside, setBeside] = useState(() => remembered.read("dock", innerWidth >= WIDE_PX ? "beside" : "below") === "beside");
  const tree = useShare("files", 18, 10, 40);
  const height = useShare("dock-below", 56, 20, 85);
  const width = useShare("dock-beside", 54, 20, 80);
  const share = beside ? width : height;
  const turn = () => {
    remembered.write("dock", beside ? "below" : "beside");
    setBeside(!beside);
  };
  const columns = isNarrow.value ? {} : { gridTemplateColumns: `minmax(196px, ${tree.share}%) 5px minmax(0, 1fr)` };
  const template = `minmax(0, ${share.share}fr) 5px minmax(0, ${100 - share.share}fr)`;
  const parts = isNarrow.value ? {} : { [beside ? "gridTemplateColumns" : "gridTemplateRows"]: template };
  return html`
    <div class="workspace-body" style=${columns} onKeyDown=${nextPart}>
      <${FileTree} runner=${inside.runner} openFiles=${inside.files} readOnly=${readOnly} fail=${fail} />
      <${Splitter} label="Width of the files" across=${true} share=${tree} />
      <div class=${`workspace-main ${beside ? "beside" : ""}`} style=${parts}>
        <${Editors} inside=${inside} readOnly=${readOnly} run=${run} save=${save} fail=${fail} />
        <${Splitter} label="Size of the editor" across=${beside} share=${share} />
        <${Dock} repl=${repl} inside=${inside} fail=${fail} />
      </div>
    </div>
    <p class="hint muted workspace-hint">
      ${!readOnly && html`<kbd>Ctrl</kbd>+<kbd>S</kbd> saves. <kbd>Ctrl</kbd>+<kbd>Enter</kbd> saves and runs. `}<kbd>F6</kbd> goes to the next part.${" "}
      <button type="button" class="link" onClick=${turn} data-testid="turn">${beside ? "Program below the editor" : "Program beside the editor"}</button></p>
  `;
}

function Stopped({ repl, fail, reload }) {
  const [busy, setBusy] = useState(false);
  const start = async () => {
    setBusy(true);
    await attempt(() => api.start({ replId: repl.replId, userId: repl.userId }), fail);
    setBusy(false);
    reload();
  };
  return html`<div class="empty"><strong>${repl.replId} is ${isIdle(repl) ? "idle" : "stopped"}</strong>
    ${repl.cause && html`<p>${repl.cause}</p>`}
    <p>Its files are in the code store. Starting it brings them back, with terminals and its address.</p>
    <p><button type="button" class="primary" disabled=${busy} data-testid="start" onClick=${start}>${busy ? "Starting…" : "Start it"}</button></p></div>`;
}

/** What is lost when the repl stops. */
function NotKept({ entries, refused }) {
  const unsaved = [...entries.filter((entry) => entry.unkept).map(({ path, unkept }) => ({ path, reason: unkept })), ...refused];
  if (!unsaved.length) return null;
  return html`<p class="note" role="status" data-testid="not-kept"><strong>Not kept when this repl stops:</strong> ${unsavedWords(unsaved)}.</p>`;
}

export function Workspace({ replId }) {
  const { data: repl, problem: unknown, loading, reload } = useLoaded((signal) => api.repl(replId, signal), replId, { pollMs: () => POLL_MS });
  const [problem, fail] = useState(null);
  const [inside] = useState(() => Inside.of(replId));
  const { runner, files, notKept } = inside;
  const up = repl && !isStopped(repl);
  useEffect(() => () => inside.leave(replId), [inside]);
  useEffect(() => {
    if (up) runner.connect();
    else if (repl) runner.disconnect();
  }, [up, runner]);
  // The address names the file that shows.
  const shown = files.shown.value;
  useEffect(() => {
    const { id, query } = route.peek();
    if (shown && id === replId && query.view === "workspace") replaceQuery({ ...query, file: shown });
  }, [shown]);
  const connected = runner.connection.value === "online" && runner.files.value !== null;
  const first = useRef(route.peek().query.file);
  useEffect(() => {
    if (!connected || files.shown.peek()) return;
    const there = runner.files.peek().filter((entry) => entry.kind === "file").map((entry) => entry.path);
    const path = [first.current, ...there].find((one) => there.includes(one) && (one === first.current || /^main\.\w+$/.test(one)));
    if (path) files.open(path).catch(fail);
  }, [connected]);

  /** Into the workspace, and from there into the code store, which otherwise takes a look every 20 s. */
  const save = (path) => {
    if (!isWorkspace(repl)) return;
    attempt(async () => {
      await (path ? files.save(path) : files.saveAll());
      const unlisted = ({ path }) => !runner.files.peek()?.some((entry) => entry.path === path && entry.unkept);
      const { unsaved = [] } = await api.save(replId);
      // What the tree marks already is no news.
      notKept.value = unsaved.filter(unlisted);
    }, fail);
  };
  const run = () => {
    if (!isWorkspace(repl)) return;
    attempt(async () => {
      await files.saveAll();
      await runner.ask("program.restart");
    }, fail);
  };
  if (!repl) {
    return html`<div class="pad">${unknown
      ? html`<a href=${href("repls")}>← All repls</a><${ProblemNote} problem=${unknown} retry=${reload} />`
      : loading && html`<p class="muted">Loading…</p>`}</div>`;
  }
  return html`
    <div class="workspace" data-testid="workspace">
      <${Head} repl=${repl} inside=${inside} run=${run} save=${save} fail=${fail} reload=${reload} />
      <div class="workspace-notes">
        <${ProblemNote} problem=${problem ?? runner.problem.value ?? unknown} dismiss=${() => { fail(null); runner.problem.value = null; }} />
        ${up && isWorkspace(repl) && html`<${NotKept} entries=${runner.files.value ?? []} refused=${notKept.value} />`}
        ${up && !isWorkspace(repl) && html`<p class="note" data-testid="is-release">This is release ${repl.release}, as it was tested: its files can be read, not changed.
          To change them, stop it and start it from its current files, or deploy another release.</p>`}
      </div>
      ${up ? html`<${Body} repl=${repl} inside=${inside} run=${run} save=${save} fail=${fail} />` : html`<${Stopped} repl=${repl} fail=${fail} reload=${reload} />`}
    </div>
  `;
}
