// The Repls tab: what is deployed or open, how it is doing, its releases, going back to one of them, starting and stopping it.
import { html, useState } from "./vendor/preact.js";
import { api } from "./api.js";
import { finishedRuns } from "./run.js";
import { href, route } from "./router.js";
import { Settings } from "./repl-settings.js";
import { POLL_MS, StateBadge, attempt, deleteRepl, isIdle, isStopped, readiness, stopRepl, unsavedProblem } from "./repl-state.js";
import { Split } from "./split.js";
import { StartDialog } from "./start-dialog.js";
import { AppLink } from "./verdict.js";
import { Workspace } from "./workspace.js";
import { Empty, ProblemNote, Time, confirmed, useLoaded } from "./ui.js";
import { count } from "./format.js";

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
    let done;
    if (await attempt(async () => { done = await api.rollback(replId, release); }, fail)) {
      fail(unsavedProblem(done, `Release ${release} serves. Not everything of the workspace was kept`));
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
  const [busy, setBusy] = useState(false);
  const inside = href("repls", repl.replId, { view: "workspace" });
  const start = async () => {
    setBusy(true);
    if (await attempt(() => api.start({ replId: repl.replId, userId: repl.userId }), fail)) location.hash = inside;
    setBusy(false);
    reload();
  };
  const remove = async () => {
    if (await deleteRepl(repl, fail)) location.hash = href("repls");
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
        <div><dt>State</dt><dd><${StateBadge} state=${repl.state} /></dd></div>
        <div><dt>Ready</dt><dd>${readiness(repl) || "–"}</dd></div>
        <div><dt>Release</dt><dd>${repl.release ?? "–"}</dd></div>
        <div><dt>Restarts</dt><dd>${repl.restarts ?? 0}</dd></div>
        <div><dt>User</dt><dd>${repl.userId}</dd></div>
        ${repl.since && html`<div><dt>Since</dt><dd><${Time} value=${repl.since} /></dd></div>`}
      </dl>
      ${repl.cause && html`<div class="note" data-testid="cause">${repl.cause}</div>`}
      ${repl.last_error && html`<div class="note bad"><strong>Last error</strong><p class="pre-line">${
        typeof repl.last_error === "string" ? repl.last_error : (repl.last_error.message ?? JSON.stringify(repl.last_error))}</p></div>`}
      <p class="record-links">
        ${isStopped(repl)
          ? html`<button type="button" class="small primary" disabled=${busy} data-testid="start" onClick=${start}>${busy ? "Starting…" : isIdle(repl) ? "Start it again" : "Start from its files"}</button>`
          : html`<a class="button small primary" href=${inside} data-testid="open-workspace">Open workspace</a>`}
        <a href=${href("logs", null, { repl_id: repl.replId })}>Its log records</a>
        <a href=${href("submissions", null, { repl_id: repl.replId })}>Its submissions</a>
        ${(!isStopped(repl) || isIdle(repl)) && html`<button type="button" class="small danger-quiet" onClick=${() => stopRepl(repl, fail).then(reload)}>Stop…</button>`}
        <button type="button" class="small danger-quiet" data-testid="delete-repl" onClick=${remove}>Delete…</button>
      </p>
      <${Settings} repl=${repl} reload=${reload} />
      <h3>Releases</h3>
      <${Releases} replId=${repl.replId} reloadRepls=${reload} fail=${fail} />
    </article>
  `;
}

function ReplList({ id }) {
  const [starting, setStarting] = useState(false);
  const loaded = useLoaded((signal) => api.repls(signal), "repls", { pollMs: () => POLL_MS, refresh: finishedRuns.value });
  return html`
    ${starting && html`<${StartDialog} close=${() => { setStarting(false); loaded.reload(); }} />`}
    <${Split} tab="repls" noun="repl" id=${id} items=${loaded.data?.repls ?? []} idOf=${(repl) => repl.replId} loaded=${loaded}
      above=${html`<div class="list-head"><button type="button" class="small primary" data-testid="new-repl" onClick=${() => setStarting(true)}>New repl…</button></div>`}
      row=${(repl) => html`
        <${StateBadge} state=${repl.state} />
        <span class="row-main">
          <span class="row-title">${repl.replId}</span>
          <span class="muted row-sub">${[repl.userId, readiness(repl), repl.restarts ? count(repl.restarts, "restart") : ""].filter(Boolean).join(" · ")}</span>
        </span>
        <span class="row-end"><span>${repl.release == null ? !isStopped(repl) && "workspace" : `release ${repl.release}`}</span></span>`}
      detail=${(repl) => html`<${Detail} key=${id} repl=${repl} reload=${loaded.reload} />`}
      none=${html`<${Empty} title="Nothing is deployed">A program that passes its tests with Deploy switched on appears here, under its own address. New repl… opens a workspace to write one in.<//>`}
      gone="It is not running, or it is not yours." unchosen="Choose one to see its state and its releases." />
  `;
}

export function ReplsPanel() {
  const { id, query } = route.value;
  return id && query.view === "workspace" ? html`<${Workspace} key=${id} replId=${id} />` : html`<${ReplList} id=${id} />`;
}
