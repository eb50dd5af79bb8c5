// The records of the Logs tab: a first load by pages, then following by event stream; bounded, and without doubles.
import { signal, batch } from "./vendor/preact.js";
import { api, logsUrl } from "./api.js";

/** The most that the server gives at once. */
const PAGE = 1_000;
/** Pages fetched before the person has to ask for more: what came meanwhile, bounded. */
const FIRST_PAGES = 2;
/** Records kept in the page; older ones leave from the top. */
const MAX_SHOWN = 1_500;
/** Following redraws this often at most. */
const FLUSH_MS = 120;
/** The stream was refused or lost for good: look again after this. */
const REOPEN_MS = 2_000;

/** The same record may come by a page and by the stream. */
function identity(record) {
  const id = record["gantry.submission_id"];
  const sequence = record["event.sequence"];
  return id !== undefined && sequence !== undefined ? `${id} ${sequence}` : JSON.stringify(record);
}

export class LogFeed {
  constructor(filter) {
    this.filter = filter;
    this.records = signal([]);
    /** Came while paused: shown when the person goes back to the end. */
    this.pending = signal(0);
    this.problem = signal(null);
    this.loading = signal(true);
    this.more = signal(false);
    /** Records that were shown and left the page, because newer ones came. */
    this.dropped = signal(0);
    /** There are matches from before the first page. */
    this.older = signal(false);
    /** Came, and were not whole. */
    this.unread = signal(0);
    this.paused = false;
    this.following = false;
    this.waiting = [];
    this.came = 0;
    this.known = new Set();
    this.cursor = null;
    this.abort = new AbortController();
  }

  async load(pages = FIRST_PAGES) {
    this.problem.value = null;
    try {
      for (let i = 0; i < pages; i++) {
        const page = await api.logs({ ...this.filter, limit: PAGE, after: this.cursor }, this.abort.signal);
        const records = page.records ?? [];
        // The first page is the newest one.
        if (this.cursor === null) this.older.value = records.length >= PAGE;
        this.show(records.filter((record) => this.isNew(record)));
        const moved = page.next != null && page.next !== this.cursor;
        this.cursor = page.next ?? this.cursor;
        this.more.value = moved && records.length >= PAGE;
        if (!this.more.value) break;
      }
    } catch (problem) {
      if (this.abort.signal.aborted) return;
      this.problem.value = problem;
    }
    this.loading.value = false;
  }

  follow(on) {
    this.following = on;
    this.stream?.close();
    this.stream = null;
    clearTimeout(this.reopen);
    if (!on || this.abort.signal.aborted) return;
    const stream = new EventSource(logsUrl({ ...this.filter, after: this.cursor }));
    this.stream = stream;
    stream.onmessage = ({ data, lastEventId }) => {
      let record;
      try {
        record = JSON.parse(data);
      } catch {
        this.unread.value += 1;
        return;
      }
      if (lastEventId) this.cursor = lastEventId;
      if (this.isNew(record)) this.later(record);
    };
    stream.addEventListener("problem", ({ data }) => this.showProblem(data));
    stream.onerror = () => {
      // A lost connection is taken up again by the browser itself; a refused one is not.
      if (stream.readyState === EventSource.CLOSED) this.reopen = setTimeout(() => this.follow(this.following), REOPEN_MS);
    };
  }

  /** The server cannot follow any further and says why. */
  showProblem(text) {
    try {
      const { message, cause, remediation } = JSON.parse(text);
      this.problem.value = { title: message, reason: cause, remediation };
    } catch {
      this.problem.value = { title: "The logs cannot be followed now" };
    }
  }

  isNew(record) {
    const key = identity(record);
    if (this.known.has(key)) return false;
    this.known.add(key);
    // A set keeps insertion order: forget the oldest.
    if (this.known.size > 4 * MAX_SHOWN) this.known.delete(this.known.values().next().value);
    return true;
  }

  later(record) {
    this.waiting.push(record);
    this.came += 1;
    this.flushTimer ??= setTimeout(() => {
      this.flushTimer = null;
      this.flush();
    }, FLUSH_MS);
  }

  flush() {
    if (this.paused) {
      this.pending.value = this.came;
      // Counted as if they had been shown: they are missing from the page all the same.
      this.dropped.value += Math.max(0, this.waiting.length - MAX_SHOWN);
      this.waiting = this.waiting.slice(-MAX_SHOWN);
      return;
    }
    const records = this.waiting;
    this.waiting = [];
    this.came = 0;
    batch(() => {
      this.pending.value = 0;
      this.show(records);
    });
  }

  show(records) {
    if (!records.length) return;
    const all = [...this.records.peek(), ...records];
    batch(() => {
      this.dropped.value += Math.max(0, all.length - MAX_SHOWN);
      this.records.value = all.slice(-MAX_SHOWN);
    });
  }

  /** Paused: the list stands still under the reader. */
  pause(on) {
    if (this.paused === on) return;
    this.paused = on;
    if (!on) this.flush();
  }

  close() {
    this.abort.abort();
    this.stream?.close();
    clearTimeout(this.flushTimer);
    clearTimeout(this.reopen);
  }
}
