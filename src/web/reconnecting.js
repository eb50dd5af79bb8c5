// A WebSocket that comes back by itself. What has to be resumed on a new connection is its owner's business.
import { signal } from "./vendor/preact.js";
import { api } from "./api.js";

/** First wait after a lost connection: short, because a restarted server is back within a second. */
const BACKOFF_START_MS = 250;
/** Longest wait: a person who watches does not wait longer than this after the server is back. */
const BACKOFF_MAX_MS = 8_000;
/** A connection that lived this long was a good one; the next loss starts from the short wait again. */
const STABLE_AFTER_MS = 3_000;
/** A handshake that takes longer than this hangs. */
const OPEN_TIMEOUT_MS = 10_000;

export class Reconnecting {
  /** `onOpen()` with each new connection, `onMessage(data)` with a text or an ArrayBuffer, `onLost()` when one ends. */
  constructor({ path, onOpen, onMessage, onLost = () => {} }) {
    Object.assign(this, { path, onOpen, onMessage, onLost });
    /** `idle`, `connecting`, `online` or `waiting` (for the next attempt). */
    this.state = signal("idle");
    this.wanted = false;
    this.socket = null;
    this.attempt = 0;
    this.timer = null;
    // Every attempt has a number: what a superseded one still reports is ignored.
    this.generation = 0;
    this.retryNow = () => this.#retryNow();
    this.shown = () => document.hidden || this.#retryNow();
  }

  get isOpen() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  /** Sends now, or returns false when there is no connection. */
  send(data) {
    if (!this.isOpen) return false;
    this.socket.send(data);
    return true;
  }

  connect() {
    if (!this.wanted) {
      addEventListener("online", this.retryNow);
      document.addEventListener("visibilitychange", this.shown);
    }
    this.wanted = true;
    if (!this.socket && this.state.peek() !== "connecting") this.#open();
  }

  disconnect() {
    removeEventListener("online", this.retryNow);
    document.removeEventListener("visibilitychange", this.shown);
    this.wanted = false;
    this.generation += 1;
    clearTimeout(this.timer);
    this.socket?.close();
    this.socket = null;
    this.attempt = 0;
    this.state.value = "idle";
  }

  /** The network or the tab is back: do not sit out the rest of a long wait. */
  #retryNow() {
    if (this.wanted && this.state.peek() === "waiting") {
      this.attempt = 0;
      this.#open();
    }
  }

  #retryLater() {
    if (!this.wanted) return;
    this.state.value = "waiting";
    const ceiling = Math.min(BACKOFF_MAX_MS, BACKOFF_START_MS * 2 ** this.attempt);
    this.attempt += 1;
    // Half fixed, half random: a thousand pages do not come back in the same instant.
    this.timer = setTimeout(() => this.#open(), ceiling / 2 + Math.random() * (ceiling / 2));
  }

  async #open() {
    clearTimeout(this.timer);
    this.generation += 1;
    const mine = this.generation;
    this.state.value = "connecting";
    let ticket;
    try {
      ({ ticket } = await api.ticket());
    } catch {
      // A lost session has signed the page out by now; anything else is tried again.
      if (mine === this.generation) this.#retryLater();
      return;
    }
    if (mine !== this.generation) return;

    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const fresh = new WebSocket(`${scheme}://${location.host}${this.path}?ticket=${encodeURIComponent(ticket)}`);
    fresh.binaryType = "arraybuffer";
    this.socket = fresh;
    const handshake = setTimeout(() => fresh.close(), OPEN_TIMEOUT_MS);
    let stable = null;

    fresh.onopen = () => {
      if (mine !== this.generation) return;
      clearTimeout(handshake);
      stable = setTimeout(() => {
        this.attempt = 0;
      }, STABLE_AFTER_MS);
      this.state.value = "online";
      this.onOpen();
    };
    fresh.onmessage = ({ data }) => {
      if (mine === this.generation) this.onMessage(data);
    };
    fresh.onclose = () => {
      clearTimeout(handshake);
      clearTimeout(stable);
      if (mine !== this.generation) return;
      this.socket = null;
      this.onLost();
      this.#retryLater();
    };
  }
}
