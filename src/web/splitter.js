// The bar between two parts of the page: dragged, or moved by the arrow keys. Where it stands is remembered.
import { html, useState } from "./vendor/preact.js";
import { remembered } from "./storage.js";

/** One press of an arrow key. */
const STEP = 2;

/** The share of the part before the bar, in percent; `set` takes another. */
export function useShare(name, otherwise, least, most) {
  const [share, setShare] = useState(() => remembered.read(`share.${name}`, otherwise));
  const set = (wanted) => {
    const now = Math.min(most, Math.max(least, wanted));
    setShare(now);
    remembered.write(`share.${name}`, now);
  };
  return { share: Math.min(most, Math.max(least, share)), set, least, most };
}

/** `across`: the parts stand beside each other. */
export function Splitter({ label, across, share: { share, set, least, most } }) {
  const drag = (event) => {
    if (!event.currentTarget.hasPointerCapture(event.pointerId)) return;
    const box = event.currentTarget.parentElement.getBoundingClientRect();
    set(across ? (100 * (event.clientX - box.left)) / box.width : (100 * (event.clientY - box.top)) / box.height);
  };
  const key = (event) => {
    const by = { ArrowLeft: -STEP, ArrowUp: -STEP, ArrowRight: STEP, ArrowDown: STEP }[event.key];
    if (!by) return;
    event.preventDefault();
    set(share + by);
  };
  return html`<div class=${`splitter ${across ? "across" : ""}`} role="separator" tabindex="0" aria-label=${label}
    aria-orientation=${across ? "vertical" : "horizontal"} aria-valuenow=${Math.round(share)} aria-valuemin=${least} aria-valuemax=${most}
    onPointerDown=${(event) => { event.preventDefault(); event.currentTarget.setPointerCapture(event.pointerId); }}
    onPointerMove=${drag} onKeyDown=${key}></div>`;
}
