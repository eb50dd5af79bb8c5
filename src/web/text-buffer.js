// Output of a program, bounded: the newest lines are kept, and what was dropped is counted.
import { signal } from "./vendor/preact.js";

/** What a person can still scroll through; the whole output stays in the record on the server. */
export const MAX_LINES = 2_000;
export const MAX_CHARS = 1024 * 1024;
/** A chunk is dropped whole: small enough not to drop much at once, large enough for few DOM nodes. */
const CHUNK_CHARS = 4 * 1024;
/** A line longer than this is cut into several chunks. */
const CHUNK_MAX_CHARS = 4 * CHUNK_CHARS;

function newlines(text) {
  let found = 0;
  for (let at = text.indexOf("\n"); at !== -1; at = text.indexOf("\n", at + 1)) found += 1;
  return found;
}

/** Where the piece that still fits `chunk` ends: behind a newline if there is one, never inside a surrogate pair. */
function pieceEnd(text, at, chunk) {
  const newline = text.indexOf("\n", at + Math.max(0, CHUNK_CHARS - chunk.text.length));
  const wanted = newline === -1 ? text.length : newline + 1;
  const most = at + CHUNK_MAX_CHARS - chunk.text.length;
  if (wanted <= most) return wanted;
  const high = text.charCodeAt(most - 1);
  return high >= 0xd800 && high <= 0xdbff ? most + 1 : most;
}

export class TextBuffer {
  constructor() {
    /** Counts up with every visible change, at most once per animation frame. */
    this.version = signal(0);
    this.clear();
  }

  clear() {
    /** `{id, text, lines}`; ids only grow, so a view can tell which of its nodes are gone. */
    this.chunks = [];
    this.chars = 0;
    this.lines = 0;
    this.droppedLines = 0;
    this.droppedChars = 0;
    this.nextId = 1;
    this.changed();
  }

  get empty() {
    return this.chunks.length === 0 && this.droppedChars === 0;
  }

  text() {
    return this.chunks.map((chunk) => chunk.text).join("");
  }

  append(text) {
    if (!text) return;
    for (let at = 0; at < text.length; ) {
      let last = this.chunks.at(-1);
      if (!last || last.full) {
        last = { id: this.nextId++, text: "", lines: 0, full: false };
        this.chunks.push(last);
      }
      const end = pieceEnd(text, at, last);
      const piece = text.slice(at, end);
      const lines = newlines(piece);
      last.text += piece;
      last.lines += lines;
      last.full = last.text.length >= CHUNK_MAX_CHARS || (last.text.length >= CHUNK_CHARS && last.text.endsWith("\n"));
      this.chars += piece.length;
      this.lines += lines;
      at = end;
      this.trim();
    }
    this.changed();
  }

  trim() {
    while (this.chunks.length > 1) {
      const [first] = this.chunks;
      const enoughWithout = this.lines - first.lines >= MAX_LINES || this.chars - first.text.length >= MAX_CHARS;
      if (!enoughWithout) return;
      this.chunks.shift();
      this.chars -= first.text.length;
      this.lines -= first.lines;
      this.droppedChars += first.text.length;
      this.droppedLines += first.lines;
    }
  }

  changed() {
    if (this.scheduled) return;
    this.scheduled = true;
    // Not requestAnimationFrame: that sleeps in a hidden tab, and the text must be there on return.
    setTimeout(() => {
      this.scheduled = false;
      this.version.value += 1;
    }, 16);
  }
}
