// One WebSocket for the page. It reconnects by itself; what has to be resumed is the listeners' business.
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
/** The server closes with 1009 above this (the contract's WebSocket message limit). */
export const MAX_MESSAGE_BYTES = 1024 * 1024;

/** `idle`, `connecting`, `online` or `waiting` (for the next attempt). */
export const connection = signal("idle");

const frameListeners = new Set();
const openListeners = new Set();
const encoder = new TextEncoder();

let wanted = false;
let socket = null;
let attempt = 0;
let timer = null;
// Every attempt has a number: what a superseded one still reports is ignored.
let generation = 0;

/** Called with each frame (a parsed object). */
export const onFrame = (listener) => frameListeners.add(listener);
/** Called each time the connection is open again. */
export const onOpen = (listener) => openListeners.add(listener);

export const isOpen = () => socket?.readyState === WebSocket.OPEN;

/** The size a message has on the wire. */
export const messageBytes = (message) => encoder.encode(JSON.stringify(message)).length;

/** Sends now, or returns false when there is no connection. */
export function send(message) {
  if (!isOpen()) return false;
  socket.send(JSON.stringify(message));
  return true;
}

export function connect() {
  wanted = true;
  if (!socket && connection.peek() !== "connecting") open();
}

export function disconnect() {
  wanted = false;
  generation += 1;
  clearTimeout(timer);
  socket?.close();
  socket = null;
  attempt = 0;
  connection.value = "idle";
}

function retryLater() {
  if (!wanted) return;
  connection.value = "waiting";
  const ceiling = Math.min(BACKOFF_MAX_MS, BACKOFF_START_MS * 2 ** attempt);
  attempt += 1;
  // Half fixed, half random: a thousand pages do not come back in the same instant.
  timer = setTimeout(open, ceiling / 2 + Math.random() * (ceiling / 2));
}

async function open() {
  clearTimeout(timer);
  generation += 1;
  const mine = generation;
  connection.value = "connecting";
  let ticket;
  try {
    ({ ticket } = await api.ticket());
  } catch {
    // A lost session has signed the page out by now; anything else is tried again.
    if (mine === generation) retryLater();
    return;
  }
  if (mine !== generation) return;

  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const fresh = new WebSocket(`${scheme}://${location.host}/ws/code?ticket=${encodeURIComponent(ticket)}`);
  socket = fresh;
  const handshake = setTimeout(() => fresh.close(), OPEN_TIMEOUT_MS);
  let stable = null;

  fresh.onopen = () => {
    if (mine !== generation) return;
    clearTimeout(handshake);
    stable = setTimeout(() => {
      attempt = 0;
    }, STABLE_AFTER_MS);
    connection.value = "online";
    for (const listener of openListeners) listener();
  };
  fresh.onmessage = ({ data }) => {
    if (mine !== generation || typeof data !== "string") return;
    let frame;
    try {
      frame = JSON.parse(data);
    } catch {
      console.warn("gantry: a frame is not JSON");
      return;
    }
    for (const listener of frameListeners) listener(frame);
  };
  fresh.onclose = () => {
    clearTimeout(handshake);
    clearTimeout(stable);
    if (mine !== generation) return;
    socket = null;
    retryLater();
  };
}

/** The network or the tab is back: do not sit out the rest of a long wait. */
function retryNow() {
  if (wanted && connection.peek() === "waiting") {
    attempt = 0;
    open();
  }
}

addEventListener("online", retryNow);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) retryNow();
});
