// The Repls tab: what is deployed, how it is doing, its releases, going back to one of them, stopping it.
import { html, useState } from "./vendor/preact.js";
import { api } from "./api.js";
import { finishedRuns } from "./run.js";
import { href, route } from "./router.js";
import { AppLink } from "./verdict.js";
import { Empty, ProblemNote, Time, confirmed, useLoaded } from "./ui.js";
import { count } from "./format.js";

/** Restarts and readiness change by themselves; a few seconds late is soon enough. */
const POLL_MS = 3_000;

function stateTone(state = "") {
  if (/^(running|ready|healthy)/.test(state)) return "ok";
  if (/^exited\(0\)/.test(state)) return "quiet";
  if (/^(exited|failed|crash)/.test(state)) return "bad";
  return /^(stopped|completed)/.test(state) ? "quiet" : "live";
}

/** `ready` comes as a number, a boolean or a text such as `1/1`. */
function readiness({ ready, replicas }) {
  if (typeof ready === "string" && ready.includes("/")) return `${ready} ready`;
  if (typeof ready === "boolean") return ready ? "ready" : "not ready";
  return ready == null ? "" : `${ready}/${replicas ?? 1} ready`;
}

function Releases({ replId, reloadRepls, fail }) {
  const { data, problem, loading, reload } = useLoaded(
    (signal) => api.releases(replId, signal), replId, { pollMs: () => POLL_MS, refresh: finishedRuns.value });
  const releases = data?.releases ?? [];
  const rollBack = async (release) => {
    const yes = await confirmed({
      title: `Go back to release ${release}?`,
      detail: `${replId} then serves release ${release} again. The current one serves until it is ready, and stays in the list.`,
      action: `Serve release ${release}`,
    });
    if (!yes) return;
    try {
      await api.rollback(replId, release);
      fail(null);
    } catch (error) {
      fail(error);
    }
    reload();
    reloadRepls();
  };
  if (problem && !data) return html`<${ProblemNote} problem=${problem} retry=${reload} />`;
  if (loading) return html`<p class="muted">Loading…</p>`;
  if (!releases.length) return html`<${Empty} title="No releases">Nothing was deployed to this repl yet.<//>`;
  return html`
    <table class="releases" data-testid="releases">
      <thead><tr><th scope="col">Release</th><th scope="col">State</th><th scope="col">Made</th><th scope="col">Submission</th><th scope="col"><span class="visually-hidden">Action</span></th></tr></thead>
      <tbody>
        ${releases.map((one) => html`
          <tr key=${one.release}>
            <td>${one.release}</td>
            <td><span class=${`badge ${one.state === "current" ? "ok" : one.state === "failed" ? "bad" : "quiet"}`}>${one.state}</span></td>
            <td><${Time} value=${one.time} /></td>
            <td>${one.submission_id && html`<a class="mono" href=${href("submissions", one.submission_id)} title=${one.submission_id}>…${one.submission_id.slice(-12)}</a>`}</td>
            <td>${one.state === "superseded" || one.state === "stopped"
              ? html`<button type="button" class="small" onClick=${() => rollBack(one.release)}>Roll back to ${one.release}</button>` : null}</td>
          </tr>`)}
      </tbody>
    </table>
  `;
}

function Detail({ repl, reload }) {
  const [problem, fail] = useState(null);
  const stop = async () => {
    const yes = await confirmed({
      title: `Stop ${repl.replId}?`,
      detail: "Its program is ended and its address stops answering. The next submission that deploys brings it back.",
      action: "Stop it",
    });
    if (!yes) return;
    try {
      await api.stop(repl.replId);
      fail(null);
    } catch (error) {
      fail(error);
    }
    reload();
  };
  return html`
    <article class="record">
      <header class="record-head">
        <h2 class="mono">${repl.replId}</h2>
        <p>${repl.url && html`<${AppLink} url=${repl.url} />`}</p>
      </header>
      <${ProblemNote} problem=${problem} />
      <dl class="facts">
        <div><dt>State</dt><dd><span class=${`badge ${stateTone(repl.state)}`}>${repl.state}</span></dd></div>
        <div><dt>Ready</dt><dd>${readiness(repl) || "–"}</dd></div>
        <div><dt>Release</dt><dd>${repl.release ?? "–"}</dd></div>
        <div><dt>Restarts</dt><dd>${repl.restarts ?? 0}</dd></div>
        <div><dt>User</dt><dd>${repl.userId}</dd></div>
        ${repl.since && html`<div><dt>Since</dt><dd><${Time} value=${repl.since} /></dd></div>`}
      </dl>
      ${repl.last_error && html`<div class="note bad"><strong>Last error</strong><p class="pre-line">${
        typeof repl.last_error === "string" ? repl.last_error : (repl.last_error.message ?? JSON.stringify(repl.last_error))}</p></div>`}
      <p class="record-links">
        <a href=${href("logs", null, { repl_id: repl.replId })}>Its log records</a>
        <a href=${href("submissions", null, { repl_id: repl.replId })}>Its submissions</a>
        ${!/^stopped/.test(repl.state ?? "") && html`<button type="button" class="small danger-quiet" onClick=${stop}>Stop…</button>`}
      </p>
      <h3>Releases</h3>
      <${Releases} replId=${repl.replId} reloadRepls=${reload} fail=${fail} />
    </article>
  `;
}

export function ReplsPanel() {
  const { id } = route.value;
  const { data, problem, loading, reload } = useLoaded((signal) => api.repls(signal), "repls",
    { pollMs: () => POLL_MS, refresh: finishedRuns.value });
  const repls = data?.repls ?? [];
  const chosen = repls.find((repl) => repl.replId === id);
  return html`
    <div class=${`split ${id ? "has-detail" : ""}`}>
      <div class="split-list">
        <${ProblemNote} problem=${problem} retry=${reload} />
        ${loading && html`<p class="muted pad">Loading…</p>`}
        ${!loading && !problem && !repls.length && html`<${Empty} title="Nothing is deployed">A program that passes its tests with Deploy switched on appears here, under its own address.<//>`}
        <ul class="rows" data-testid="repls">
          ${repls.map((repl) => html`
            <li key=${repl.replId}>
              <a class="row" href=${href("repls", repl.replId)} aria-current=${repl.replId === id ? "true" : undefined}>
                <span class=${`badge ${stateTone(repl.state)}`}>${repl.state}</span>
                <span class="row-main">
                  <span class="row-title">${repl.replId}</span>
                  <span class="muted row-sub">${[repl.userId, readiness(repl), repl.restarts ? count(repl.restarts, "restart") : ""].filter(Boolean).join(" · ")}</span>
                </span>
                <span class="row-end"><span>${repl.release != null && `release ${repl.release}`}</span></span>
              </a>
            </li>`)}
        </ul>
      </div>
      <div class="split-detail">
        ${id && html`<a class="back" href=${href("repls")}>← All repls</a>`}
        ${chosen && html`<${Detail} key=${id} repl=${chosen} reload=${reload} />`}
        ${id && !chosen && !loading && !problem && html`<${Empty} title="No such repl">It is not running, or it is not yours.<//>`}
        ${!id && html`<${Empty} title="No repl chosen">Choose one to see its state and its releases.<//>`}
      </div>
    </div>
  `;
}
