// A terminal of a repl, drawn by xterm.js. What runs in it outlives this page; it shows again what it showed last.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { isDark } from "./theme.js";

/** Bytes that wait to be drawn. Past that what comes is let go: the newest is asked for again when the rest is drawn. */
const MOST_UNDRAWN = 4 * 1024 * 1024;
/** Lines that can be scrolled back to. */
const SCROLLBACK = 5_000;
/** A window being dragged changes size often; the program in the terminal draws itself anew each time. */
const RESIZE_PAUSE_MS = 80;

const encoder = new TextEncoder();

let loading = null;

function loadXterm() {
  loading ??= Promise.all([import("./vendor/xterm.js"), styleSheet("/assets/vendor/xterm.css")]).then(([xterm]) => xterm, (error) => {
    loading = null;
    throw error;
  });
  return loading;
}

function styleSheet(href) {
  return new Promise((resolve, reject) => {
    const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href, onload: resolve });
    link.onerror = () => reject(new Error(`${href} did not load`));
    document.head.append(link);
  });
}

const LIGHT = {
  background: "#ffffff", foreground: "#1a1f26", cursor: "#2456c7", cursorAccent: "#ffffff", selectionBackground: "#cfdcf7",
  black: "#1a1f26", red: "#b3261e", green: "#17703f", yellow: "#835600", blue: "#2456c7", magenta: "#8a1f83", cyan: "#0b6b75", white: "#6b7583",
  brightBlack: "#566070", brightRed: "#c62f26", brightGreen: "#1d8a4e", brightYellow: "#9a6700", brightBlue: "#1d4fb8", brightMagenta: "#a02b98",
  brightCyan: "#0e7c88", brightWhite: "#3a424d",
};
const DARK = {
  background: "#161b22", foreground: "#e4e8ee", cursor: "#7ea6ff", cursorAccent: "#161b22", selectionBackground: "#2b4170",
  black: "#2b333e", red: "#ff8a80", green: "#56c58c", yellow: "#e3b04b", blue: "#7ea6ff", magenta: "#d895e0", cyan: "#62cdd8", white: "#c9d1db",
  brightBlack: "#7f8b9c", brightRed: "#ffa79f", brightGreen: "#7fd1a3", brightYellow: "#f0c674", brightBlue: "#a2beff", brightMagenta: "#e6b3ec",
  brightCyan: "#8fe0e8", brightWhite: "#ffffff",
};

/** Keys that are the page's: leaving the terminal, copying what is selected, pasting. */
function isThePages(event, term) {
  if (event.key === "F6") return true;
  const command = (event.ctrlKey || event.metaKey) && !event.altKey;
  const key = event.key.toLowerCase();
  return command && (key === "v" || (key === "c" && term.hasSelection()));
}

/** One terminal and its connection; it lives as long as its tab. */
class Screen {
  constructor(xterm, runner, name, fail) {
    Object.assign(this, { runner, name, fail });
    const style = getComputedStyle(document.documentElement);
    this.term = new xterm.Terminal({
      allowProposedApi: true, cursorBlink: true, scrollback: SCROLLBACK, fontSize: 13, lineHeight: 1.2,
      fontFamily: style.getPropertyValue("--mono"), theme: isDark() ? DARK : LIGHT, macOptionIsMeta: true,
    });
    this.fitting = new xterm.FitAddon();
    this.term.loadAddon(this.fitting);
    // Widths of characters as today's shells count them.
    this.term.loadAddon(new xterm.Unicode11Addon());
    this.term.unicode.activeVersion = "11";
    this.term.attachCustomKeyEventHandler((event) => !isThePages(event, this.term));
    this.term.onData((text) => this.typed(encoder.encode(text)));
    this.term.onBinary((text) => this.typed(Uint8Array.from(text, (character) => character.charCodeAt(0))));
    this.undrawn = 0;
    this.skipping = false;
    this.isOpen = false;
    this.hasEnded = false;
    runner.screens.set(name, this);
  }

  show(host) {
    this.term.open(host);
    this.fit();
    this.watcher = new ResizeObserver(() => {
      clearTimeout(this.resizing);
      this.resizing = setTimeout(() => this.fit(), RESIZE_PAUSE_MS);
    });
    this.watcher.observe(host);
  }

  size() {
    return { terminal: this.name, cols: this.term.cols, rows: this.term.rows };
  }

  /** Takes up the window's size, unless it is hidden. */
  fit() {
    const wanted = this.fitting.proposeDimensions();
    if (!wanted || !(wanted.cols > 1) || !(wanted.rows > 1)) return;
    if (wanted.cols === this.term.cols && wanted.rows === this.term.rows) return;
    this.term.resize(wanted.cols, wanted.rows);
    if (this.isOpen) this.runner.ask("terminal.resize", this.size()).catch(() => {});
  }

  /** Looks at it, from what it showed last on. */
  async open() {
    this.isOpen = false;
    this.hasEnded = false;
    try {
      await this.runner.ask("terminal.open", this.size());
    } catch (problem) {
      if (this.runner.wire.isOpen) this.fail(problem);
      return;
    }
    const known = this.runner.terminals.peek();
    if (!known.includes(this.name)) this.runner.terminals.value = [...known, this.name];
    this.term.reset();
    this.isOpen = true;
  }

  reopened() {
    if (!this.hasEnded) this.open();
  }

  bytes(data) {
    // What comes before the answer is in what it showed last, too.
    if (!this.isOpen || this.skipping) return;
    this.undrawn += data.length;
    this.term.write(data, () => {
      this.undrawn -= data.length;
      if (this.skipping && this.undrawn === 0) {
        this.skipping = false;
        this.open();
      }
    });
    this.skipping = this.undrawn > MOST_UNDRAWN;
  }

  ended(code) {
    this.isOpen = false;
    this.hasEnded = true;
    this.term.write(`\r\n\x1b[2mThe shell ended with exit code ${code}. Press Enter for a new one.\x1b[0m\r\n`);
  }

  typed(bytes) {
    if (!this.hasEnded) this.runner.type(this.name, bytes);
    else if (bytes[0] === 13) this.open();
  }

  dispose() {
    clearTimeout(this.resizing);
    this.watcher?.disconnect();
    this.runner.screens.delete(this.name);
    this.term.dispose();
  }
}

/** `focused`: it was just chosen, and takes the keyboard. */
export function Terminal({ runner, name, focused, fail }) {
  const host = useRef(null);
  const screen = useRef(null);
  const [state, setState] = useState("loading");
  const dark = isDark();

  useEffect(() => {
    let gone = false;
    loadXterm().then((xterm) => {
      if (gone) return;
      screen.current = new Screen(xterm, runner, name, fail);
      screen.current.show(host.current);
      screen.current.open();
      setState("ready");
    }, (error) => {
      console.warn("gantry: the terminal did not load", error);
      if (!gone) setState("failed");
    });
    return () => {
      gone = true;
      screen.current?.dispose();
      screen.current = null;
    };
  }, [runner, name]);
  useEffect(() => {
    if (screen.current) screen.current.term.options.theme = dark ? DARK : LIGHT;
  }, [dark, state]);
  useEffect(() => {
    if (!focused || !screen.current) return;
    screen.current.fit();
    screen.current.term.focus();
  }, [focused, state]);

  return html`
    <div class="terminal-pane" data-testid="terminal" data-terminal=${name} data-state=${state}>
      <div class="terminal-host" ref=${host}></div>
      ${state === "failed" && html`<p class="muted pad" role="alert">The terminal did not load. Reload the page; gantry shell opens one without it.</p>`}
    </div>
  `;
}
