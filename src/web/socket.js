// One WebSocket for the page's submissions.
import { Reconnecting } from "./reconnecting.js";

/** The server closes with 1009 above this (the contract's WebSocket message limit). */
export const MAX_MESSAGE_BYTES = 1024 * 1024;

const frameListeners = new Set();
const openListeners = new Set();
const encoder = new TextEncoder();

const wire = new Reconnecting({
  path: "/ws/code",
  onOpen: () => openListeners.forEach((listener) => listener()),
  onMessage: (data) => {
    if (typeof data !== "string") return;
    let frame;
    try {
      frame = JSON.parse(data);
    } catch {
      console.warn("gantry: a frame is not JSON");
      return;
    }
    for (const listener of frameListeners) listener(frame);
  },
});

/** `idle`, `connecting`, `online` or `waiting` (for the next attempt). */
export const connection = wire.state;

/** Called with each frame (a parsed object). */
export const onFrame = (listener) => frameListeners.add(listener);
/** Called each time the connection is open again. */
export const onOpen = (listener) => openListeners.add(listener);

export const isOpen = () => wire.isOpen;

/** The size a message has on the wire. */
export const messageBytes = (message) => encoder.encode(JSON.stringify(message)).length;

/** Sends now, or returns false when there is no connection. */
export const send = (message) => wire.send(JSON.stringify(message));

export const connect = () => wire.connect();
export const disconnect = () => wire.disconnect();
