// A repl's runner: requests and their answers, terminals' bytes, and what it tells by itself (README.md, "The runner's port").
import { signal } from "./vendor/preact.js";
import { Problem } from "./api.js";
import { Reconnecting } from "./reconnecting.js";
import { TextBuffer } from "./text-buffer.js";

/** An answer takes this long at most: ending a program that does not want to end takes most of it. */
const ANSWER_TIMEOUT_MS = 30_000;
/** A piece of a file: in base64 and with what stands around it, it fits into a message of 1 MiB. */
const PIECE_BYTES = 512 * 1024;
/** The runner's own bound for one file. */
export const MAX_FILE_BYTES = 128 * 1024 * 1024;
/** A piece of what is typed or pasted: its program reads it piece by piece. */
const INPUT_BYTES = 16 * 1024;
/** `btoa` takes a text, and a function only so many arguments. */
const CALL_BYTES = 8 * 1024;

const encoder = new TextEncoder();
const decoder = new TextDecoder();

function toBase64(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += CALL_BYTES) text += String.fromCharCode(...bytes.subarray(at, at + CALL_BYTES));
  return btoa(text);
}

const fromBase64 = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

export class Runner {
  constructor(replId) {
    this.wire = new Reconnecting({
      path: `/repls/${encodeURIComponent(replId)}/terminal`,
      onOpen: () => this.#opened(),
      onMessage: (data) => this.#heard(data),
      onLost: () => this.#lost(),
    });
    this.connection = this.wire.state;
    /** `{state, exit_code, reason}`; `state` is `starting`, `serving`, `ended` or, before it was told, `unknown`. */
    this.program = signal({ state: "unknown" });
    /** What the program printed: of its run, as far as the page was there, and before that the end of it. */
    this.output = signal(new TextBuffer());
    /** What the workspace holds, or null before it was told. */
    this.files = signal(null);
    /** Names of the terminals there are. */
    this.terminals = signal([]);
    /** What went wrong without having been asked for. */
    this.problem = signal(null);
    this.last = 0;
    this.waiting = new Map();
    /** By a terminal's name: `{bytes(data), reopened(), ended(code)}`. */
    this.screens = new Map();
    this.changeListeners = new Set();
  }

  connect() {
    this.wire.connect();
  }

  disconnect() {
    this.wire.disconnect();
    this.#lost();
  }

  /** Called with the paths that changed, or null when there are too many to tell. */
  onChange(listener) {
    this.changeListeners.add(listener);
    return () => this.changeListeners.delete(listener);
  }

  /** Asks; what is refused becomes a Problem. */
  ask(op, fields = {}) {
    return new Promise((resolve, reject) => {
      const id = ++this.last;
      const lost = (why) => {
        this.waiting.delete(id);
        clearTimeout(timer);
        reject(new Problem({ title: "The workspace did not answer", cause: why,
          remediation: "The page connects again by itself; then try once more." }));
      };
      const timer = setTimeout(() => lost(`There was no answer within ${ANSWER_TIMEOUT_MS / 1000} s.`), ANSWER_TIMEOUT_MS);
      this.waiting.set(id, { resolve, reject, lost, timer });
      if (!this.wire.send(JSON.stringify({ id, op, ...fields }))) lost("There is no connection to it now.");
    });
  }

  /** The whole of a file, at most `most` bytes of it. */
  async read(path, most = MAX_FILE_BYTES) {
    const pieces = [];
    let length = 0;
    for (let more = true; more; ) {
      const piece = await this.ask("files.read", { path, offset: length });
      if (piece.size > most) throw new Problem({ title: `${path} is too large`, cause: `It has ${piece.size} bytes, and ${most} are the most here.` });
      const bytes = piece.text === undefined ? fromBase64(piece.base64) : encoder.encode(piece.text);
      pieces.push(bytes);
      length += bytes.length;
      more = piece.more;
    }
    const whole = new Uint8Array(length);
    let at = 0;
    for (const piece of pieces) {
      whole.set(piece, at);
      at += piece.length;
    }
    return whole;
  }

  /** Writes a file; it takes its place when all of it is there. `progress(bytes)` after each piece. */
  async write(path, bytes, progress = () => {}) {
    for (let offset = 0, more = true; more; offset += PIECE_BYTES) {
      const piece = bytes.subarray(offset, offset + PIECE_BYTES);
      more = offset + piece.length < bytes.length;
      await this.ask("files.write", { path, offset, more, base64: toBase64(piece) });
      progress(offset + piece.length);
    }
  }

  /** Types into a terminal. */
  type(terminal, bytes) {
    const name = encoder.encode(terminal);
    for (let at = 0; at < bytes.length; at += INPUT_BYTES) {
      const piece = bytes.subarray(at, at + INPUT_BYTES);
      const frame = new Uint8Array(1 + name.length + piece.length);
      frame[0] = name.length;
      frame.set(name, 1);
      frame.set(piece, 1 + name.length);
      if (!this.wire.send(frame)) return;
    }
  }

  async loadFiles() {
    const { files } = await this.ask("files.tree");
    this.files.value = files;
  }

  async #opened() {
    try {
      // Watched first: what changes between the two is told.
      await this.ask("files.watch", { on: true });
      const { output, ...program } = await this.ask("program.state");
      this.program.value = program;
      this.#printed(output);
      this.terminals.value = await this.#listTerminals();
      await this.loadFiles();
      this.problem.value = null;
      for (const screen of this.screens.values()) screen.reopened();
      for (const listener of this.changeListeners) listener(null);
    } catch (problem) {
      // Lost again: the next connection begins anew.
      if (this.wire.isOpen) this.problem.value = problem;
    }
  }

  /** A pod that was started before this page's server may have a runner that keeps no list. */
  async #listTerminals() {
    try {
      return (await this.ask("terminal.list")).terminals;
    } catch (problem) {
      if (problem.code === "refused") return [];
      throw problem;
    }
  }

  /** From here on, with this at first. */
  #printed(text) {
    const fresh = new TextBuffer();
    fresh.append(text);
    this.output.value = fresh;
  }

  #lost() {
    for (const { lost } of [...this.waiting.values()]) lost("The connection was lost.");
  }

  #heard(data) {
    if (typeof data !== "string") {
      const bytes = new Uint8Array(data);
      const name = decoder.decode(bytes.subarray(1, 1 + bytes[0]));
      this.screens.get(name)?.bytes(bytes.subarray(1 + bytes[0]));
      return;
    }
    const told = JSON.parse(data);
    if (told.id !== undefined) this.#answered(told);
    else this.#told(told);
  }

  #answered(answer) {
    const asked = this.waiting.get(answer.id);
    if (!asked) return;
    this.waiting.delete(answer.id);
    clearTimeout(asked.timer);
    if (answer.error) {
      const { message, ...rest } = answer.error;
      asked.reject(new Problem({ title: message, ...rest }));
    } else asked.resolve(answer);
  }

  #told({ event, ...told }) {
    switch (event) {
      case "program":
        // A release that failed and is started again: how it failed stays to be read.
        if (told.state === "starting" && !told.restarts) this.#printed("");
        this.program.value = told;
        break;
      case "output":
        this.output.peek().append(told.data);
        break;
      case "lost":
        this.output.peek().append("\n[Some output came faster than this page could take it, and is missing here.]\n");
        break;
      case "ended":
        this.terminals.value = this.terminals.peek().filter((name) => name !== told.terminal);
        this.screens.get(told.terminal)?.ended(told.exit_code);
        break;
      case "changed":
        this.#changed(told.more ? null : told.paths);
        break;
      case "error":
        this.problem.value = new Problem({ title: told.error.message, cause: told.error.cause, remediation: told.error.remediation });
        break;
    }
  }

  async #changed(paths) {
    try {
      await this.loadFiles();
    } catch (problem) {
      if (this.wire.isOpen) this.problem.value = problem;
    }
    for (const listener of this.changeListeners) listener(paths);
  }
}
