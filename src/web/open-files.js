// The files that are open in a repl's editor: what is on disk, what was typed since, and saving.
import { signal, computed } from "./vendor/preact.js";
import { Problem } from "./api.js";

/** More text than this makes an editor in a page slow. */
const MOST_TEXT = 2 * 1024 * 1024;
/** Each has an editor of its own, with its history. The longest unused one that is saved is closed. */
const MOST_OPEN = 16;

const encoder = new TextEncoder();
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** A file's text for the editor, which knows one kind of line end, and how to write it back as it was. */
function decoded(path, bytes) {
  let text;
  try {
    text = strict.decode(bytes);
  } catch {
    throw new Problem({ title: `${path} is not text`, cause: "It holds bytes that are no UTF-8.", remediation: "Download it to look at it elsewhere." });
  }
  const crlf = text.includes("\r\n") && !/[^\r]\n/.test(text);
  return { text: crlf ? text.replaceAll("\r\n", "\n") : text, crlf };
}

export class OpenFiles {
  constructor(runner) {
    this.runner = runner;
    /** `{path, text, saved, crlf, conflict}`; `conflict` is what somebody else wrote while this was being edited. */
    this.files = signal([]);
    this.shown = signal(null);
    this.dirty = computed(() => this.files.value.filter((file) => file.text !== file.saved));
    this.stopListening = runner.onChange((paths) => this.#changed(paths));
    this.used = [];
  }

  #find(path) {
    return this.files.peek().find((file) => file.path === path);
  }

  #change(path, fields) {
    this.files.value = this.files.peek().map((file) => (file.path === path ? { ...file, ...fields } : file));
  }

  /** Shows a file, read first when it is not open. */
  async open(path) {
    if (!this.#find(path)) {
      const read = decoded(path, await this.runner.read(path, MOST_TEXT));
      if (!this.#find(path)) this.files.value = [...this.files.peek(), { path, ...read, saved: read.text, conflict: null }];
    }
    this.show(path);
    this.#closeOldest();
  }

  show(path) {
    this.shown.value = path;
    this.used = [...this.used.filter((one) => one !== path), path];
  }

  #closeOldest() {
    const files = this.files.peek();
    if (files.length <= MOST_OPEN) return;
    const dirty = new Set(this.dirty.peek().map((file) => file.path));
    const oldest = this.used.find((path) => !dirty.has(path) && path !== this.shown.peek());
    if (oldest) this.close(oldest);
  }

  close(path) {
    const before = this.files.peek();
    const at = before.findIndex((file) => file.path === path);
    this.files.value = before.filter((file) => file.path !== path);
    this.used = this.used.filter((one) => one !== path);
    if (this.shown.peek() === path) this.shown.value = (before[at + 1] ?? before[at - 1])?.path ?? null;
  }

  /** The text of a file as a signal; undefined once the file is closed. */
  textOf(path) {
    return computed(() => this.files.value.find((file) => file.path === path)?.text);
  }

  edit(path, text) {
    this.#change(path, { text });
  }

  async save(path) {
    const file = this.#find(path);
    if (!file) return;
    const { text } = file;
    await this.runner.write(path, encoder.encode(file.crlf ? text.replaceAll("\n", "\r\n") : text));
    this.#change(path, { saved: text, conflict: null });
  }

  async saveAll() {
    for (const { path } of this.dirty.peek()) await this.save(path);
  }

  /** Somebody else's text in place of the one here. */
  takeTheirs(path) {
    const { conflict } = this.#find(path) ?? {};
    if (conflict) this.#change(path, { ...conflict, saved: conflict.text, conflict: null });
  }

  /** The one here stays, and is written with the next save. */
  keepMine(path) {
    const { conflict } = this.#find(path) ?? {};
    if (conflict) this.#change(path, { saved: conflict.text, conflict: null });
  }

  /** A file or a folder has another name. */
  renamed(from, to) {
    const moved = (path) => (path === from ? to : path?.startsWith(`${from}/`) ? to + path.slice(from.length) : path);
    this.files.value = this.files.peek().map((file) => ({ ...file, path: moved(file.path) }));
    this.used = this.used.map(moved);
    this.shown.value = moved(this.shown.peek());
  }

  /** A file or a folder is gone. */
  removed(gone) {
    for (const { path } of this.files.peek()) if (path === gone || path.startsWith(`${gone}/`)) this.close(path);
  }

  /** Looks again at what changed; `null`: at everything. */
  async #changed(paths) {
    const there = new Set((this.runner.files.peek() ?? []).map((entry) => entry.path));
    for (const { path } of this.files.peek()) {
      if (paths && !paths.includes(path)) continue;
      const isDirty = () => this.dirty.peek().some((file) => file.path === path);
      if (!there.has(path)) {
        // What was typed is not thrown away: saving makes the file again.
        if (isDirty()) this.#change(path, { saved: null });
        else this.close(path);
        continue;
      }
      let read;
      try {
        read = decoded(path, await this.runner.read(path, MOST_TEXT));
      } catch {
        // Gone again, or no text any more: the next change or save says so.
        continue;
      }
      const file = this.#find(path);
      if (!file || read.text === file.saved) continue;
      if (read.text === file.text) this.#change(path, { saved: read.text, conflict: null });
      else if (isDirty()) this.#change(path, { conflict: read });
      else this.#change(path, { ...read, saved: read.text });
    }
  }
}

/** What the editor calls a file's language, by its name. */
const LANGUAGES = {
  py: "python", js: "javascript", mjs: "javascript", cjs: "javascript", jsx: "javascript", json: "javascript", ts: "typescript", mts: "typescript",
  tsx: "typescript", sh: "bash", bash: "bash", go: "go", rs: "rust", c: "c", h: "c", cc: "cpp", cpp: "cpp", cxx: "cpp", hpp: "cpp", java: "java",
  rb: "ruby", pl: "perl", pm: "perl", lua: "lua", toml: "toml", yaml: "yaml", yml: "yaml", css: "css", html: "html", htm: "html", xml: "xml", svg: "xml",
  sql: "sql",
};

export function languageOf(path) {
  const name = path.slice(path.lastIndexOf("/") + 1);
  if (name === "Dockerfile") return "dockerfile";
  return LANGUAGES[name.slice(name.lastIndexOf(".") + 1).toLowerCase()] ?? "text";
}
