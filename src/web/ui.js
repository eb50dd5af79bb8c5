// Small shared pieces. Text always goes in as text nodes; nothing here takes markup.
import { html, signal, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact.js";
import { fullTime, when } from "./format.js";

/** A problem with what happened, why, and what to do. */
export function ProblemNote({ problem, retry, dismiss }) {
  if (!problem) return null;
  const title = problem.title ?? problem.message ?? "Something went wrong";
  const details = [problem.detail, problem.reason].filter((line, i, all) => line && line !== title && all.indexOf(line) === i);
  return html`
    <div class="note bad" role="alert">
      <strong>${title}</strong>
      ${details.map((line) => html`<p>${line}</p>`)}
      ${problem.remediation && html`<p>${problem.remediation}</p>`}
      ${retry && html`<button type="button" class="small" onClick=${retry}>Try again</button>`}
      ${dismiss && html`<button type="button" class="small" onClick=${dismiss}>Dismiss</button>`}
    </div>
  `;
}

export function Empty({ title, children }) {
  return html`<div class="empty"><strong>${title}</strong><p>${children}</p></div>`;
}

export function Time({ value }) {
  return html`<time datetime=${value} title=${fullTime(value)}>${when(value)}</time>`;
}

const STATUS_WORDS = {
  deployed: "Deployed",
  tests_passed: "Passed",
  tests_failed: "Failed",
  deploy_failed: "Deploy failed",
  superseded: "Superseded",
  cancelled: "Cancelled",
  invalid: "Not accepted",
  unavailable: "Unavailable",
};

const STATUS_TONE = { deployed: "ok", tests_passed: "ok", tests_failed: "bad", deploy_failed: "bad", invalid: "bad", unavailable: "warn" };

export const statusTone = (status) => (status ? (STATUS_TONE[status] ?? "quiet") : "live");

export function StatusBadge({ status }) {
  return html`<span class=${`badge ${statusTone(status)}`}>${status ? (STATUS_WORDS[status] ?? status) : "Running"}</span>`;
}

/** A filter field: reports what was typed once the person pauses, so that not every letter asks the server. */
const TYPING_PAUSE_MS = 250;

export function FilterInput({ value, onChange, ...rest }) {
  const [text, setText] = useState(value);
  const timer = useRef(null);
  const reported = useRef(value);
  // At the render itself: a moment later more may have been reported, and this would be an old text.
  useLayoutEffect(() => {
    // Changed from outside (a link, the back button), not the echo of what was typed here.
    if (value === reported.current) return;
    clearTimeout(timer.current);
    setText(value);
    reported.current = value;
  }, [value]);
  const report = (now) => {
    clearTimeout(timer.current);
    reported.current = now.trim();
    onChange(now.trim());
  };
  return html`<input ...${rest} value=${text}
    onInput=${(event) => {
      const now = event.currentTarget.value;
      setText(now);
      clearTimeout(timer.current);
      timer.current = setTimeout(() => report(now), TYPING_PAUSE_MS);
    }}
    onKeyDown=${(event) => event.key === "Enter" && report(text)} />`;
}

/**
 * Loads with `load(signal)` whenever `key` changes, and again when `refresh` changes or after `pollMs(data)` while the
 * tab is visible (0: not again). Data of the same key stays on screen while it is loaded again.
 */
export function useLoaded(load, key, { pollMs = () => 0, refresh = 0 } = {}) {
  const [state, setState] = useState({ key: null, data: null, problem: null });
  const [round, setRound] = useState(0);
  useEffect(() => {
    const abort = new AbortController();
    let timer = null;
    const again = (data) => {
      const wait = pollMs(data);
      if (wait && !abort.signal.aborted) timer = setTimeout(() => (document.hidden ? again(data) : run()), wait);
    };
    async function run() {
      let data = null;
      try {
        data = await load(abort.signal);
        if (!abort.signal.aborted) setState({ key, data, problem: null });
      } catch (problem) {
        if (!abort.signal.aborted) setState((before) => ({ key, data: before.key === key ? before.data : null, problem }));
      }
      again(data);
    }
    run();
    return () => {
      abort.abort();
      clearTimeout(timer);
    };
  }, [key, round, refresh]);
  const current = state.key === key;
  return {
    data: current ? state.data : null,
    problem: current ? state.problem : null,
    loading: !current,
    reload: () => setRound((n) => n + 1),
  };
}

const question = signal(null);

/** Asks in a modal dialog; resolves to true or false. */
export function confirmed({ title, detail, action }) {
  return new Promise((resolve) => {
    question.value = { title, detail, action, resolve: (answer) => resolve(answer !== null) };
  });
}

/** Asks for a text in a modal dialog; resolves to it, or to null. `danger`: what follows cannot be undone. */
export function asked({ title, detail, label, value, action, danger }) {
  return new Promise((resolve) => {
    question.value = { title, detail, label, value, action, danger, resolve };
  });
}

export function ConfirmDialog() {
  const dialog = useRef(null);
  const field = useRef(null);
  const now = question.value;
  const asksText = now?.label !== undefined;
  useEffect(() => {
    if (!now || dialog.current.open) return;
    dialog.current.showModal();
    if (!field.current) return;
    // A name is changed more often than its ending.
    const { value } = field.current;
    field.current.setSelectionRange(value.lastIndexOf("/") + 1, value.includes(".") ? value.lastIndexOf(".") : value.length);
  }, [now]);
  const answer = (given) => {
    question.value = null;
    dialog.current.close();
    now?.resolve(given);
  };
  return html`
    <dialog ref=${dialog} aria-labelledby="confirm-title" onCancel=${(event) => { event.preventDefault(); answer(null); }}>
      <form onSubmit=${(event) => { event.preventDefault(); answer(asksText ? field.current.value.trim() : ""); }}>
        <h2 id="confirm-title">${now?.title}</h2>
        ${asksText && now.detail && html`<p>${now.detail}</p>`}
        ${asksText
          ? html`<label class="asked">${now.label}<input class="mono" ref=${field} defaultValue=${now.value} required autofocus autocapitalize="off" autocomplete="off" spellcheck="false" data-testid="asked" /></label>`
          : html`<p>${now?.detail}</p>`}
        <div class="dialog-actions">
          <button type="button" onClick=${() => answer(null)} autofocus=${!asksText}>${asksText ? "Cancel" : "Keep as it is"}</button>
          <button type="submit" class=${asksText && !now.danger ? "primary" : "danger"}>${now?.action}</button>
        </div>
      </form>
    </dialog>
  `;
}
