// How a repl is doing, in words and colours, and what can be done with all of it.
import { html } from "./vendor/preact.js";
import { api } from "./api.js";
import { asked, confirmed } from "./ui.js";

/** Restarts and readiness change by themselves; a few seconds late is soon enough. */
export const POLL_MS = 3_000;

/** Nothing of it runs: its user stopped it, or nobody used it. */
export const isStopped = ({ state }) => /^(stopped|idle)/.test(state ?? "");
export const isIdle = ({ state }) => state === "idle";
/** Its current files run, and may be changed; a release is what was tested. */
export const isWorkspace = (repl) => !isStopped(repl) && repl.release == null;

function tone(state = "") {
  if (/^(running|ready|healthy)/.test(state)) return "ok";
  if (/^exited\(0\)/.test(state)) return "quiet";
  if (/^(exited|failed|crash)/.test(state)) return "bad";
  return /^(stopped|idle|completed)/.test(state) ? "quiet" : "live";
}

export function StateBadge({ state }) {
  return html`<span class=${`badge ${tone(state)}`} data-testid="repl-state">${state}</span>`;
}

/** `ready` comes as a number, a boolean or a text such as `1/1`. */
export function readiness({ ready, replicas }) {
  if (typeof ready === "string" && ready.includes("/")) return `${ready} ready`;
  if (typeof ready === "boolean") return ready ? "ready" : "not ready";
  return ready == null ? "" : `${ready}/${replicas ?? 1} ready`;
}

/** Shown by name of what cannot be kept. */
const MOST_NAMED = 5;

/** `[{path, reason}]` in words; `more`: how many there are beyond those. */
export function unsavedWords(unsaved = [], more = 0) {
  const rest = unsaved.length - MOST_NAMED + more;
  const named = unsaved.slice(0, MOST_NAMED).map(({ path, reason }) => `${path} (${reason})`);
  return named.join(", ") + (rest > 0 ? ` and ${rest} more` : "");
}

/** What a save, a stop or a rollback could not keep, as a problem; null: it kept everything. */
export function unsavedProblem({ unsaved = [], unsaved_more: more, saveError } = {}, title) {
  if (!unsaved.length && !saveError) return null;
  return {
    title,
    detail: unsaved.length ? unsavedWords(unsaved, more) : undefined,
    reason: saveError && `The last changes could not be saved: ${saveError.message}: ${saveError.cause}`,
  };
}

/** What stopping a workspace would lose. It is saved for that; what keeps it from being saved is told as well. */
async function losses(repl) {
  try {
    const { unsaved = [], unsaved_more: more } = await api.save(repl.replId);
    return unsaved.length ? ` These cannot be kept and will be lost: ${unsavedWords(unsaved, more)}.` : "";
  } catch (problem) {
    return ` Now it cannot be saved (${problem.reason ?? problem.message}): the last changes may be lost.`;
  }
}

/** Stops it when the person says so; `fail` hears why it did not, and what could not be kept. */
export async function stopRepl(repl, fail) {
  const yes = await confirmed({
    title: `Stop ${repl.replId}?`,
    detail: isWorkspace(repl)
      ? `Its program and its terminals are ended. Its files are saved first; starting it again brings them back.${await losses(repl)}`
      : "Its program is ended and its address stops answering. The next submission that deploys brings it back, and so does a rollback.",
    action: "Stop it",
  });
  if (!yes) return;
  let stopped;
  if (await attempt(async () => { stopped = await api.stop(repl.replId); }, fail)) {
    fail(unsavedProblem(stopped, `${repl.replId} is stopped. Not everything was kept`));
  }
}

/** Deletes it when the person types its name, having been told what goes with it. Whether it was deleted. */
export async function deleteRepl({ replId }, fail) {
  let deletes;
  try {
    await api.deleteRepl(replId);
    return true;
  } catch (problem) {
    if (problem.code !== "not_confirmed") {
      fail(problem);
      return false;
    }
    deletes = problem.reason;
  }
  const typed = await asked({
    title: `Delete ${replId} for good?`,
    detail: `It is stopped, and ${deletes.replace("would be deleted for good", "are deleted")}. Nothing brings them back, and anybody can take its name.`,
    label: `Type ${replId} to delete it`,
    value: "",
    action: "Delete it",
    danger: true,
  });
  if (typed === null) return false;
  if (typed !== replId) {
    fail({ title: `${replId} is not deleted`, detail: "Its name was not typed as it is written." });
    return false;
  }
  return attempt(() => api.deleteRepl(replId, replId), fail);
}

/** Does it, and says how it went: `fail(null)` or `fail(problem)`. */
export async function attempt(body, fail) {
  try {
    await body();
    fail(null);
    return true;
  } catch (problem) {
    fail(problem);
    return false;
  }
}
