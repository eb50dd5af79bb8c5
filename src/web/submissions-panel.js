// The Submissions tab: a filtered list, and beside it the one that the address names.
import { html, useEffect, useState } from "./vendor/preact.js";
import { api } from "./api.js";
import { finishedRuns } from "./run.js";
import { isAdmin } from "./session.js";
import { href, replaceQuery, route } from "./router.js";
import { SubmissionView } from "./submission-view.js";
import { Empty, FilterInput, ProblemNote, StatusBadge, Time, useLoaded } from "./ui.js";
import { duration } from "./format.js";

const PAGE = 50;
/** New submissions of other people show up without a reload. */
const POLL_MS = 4_000;
const STATUSES = ["deployed", "tests_passed", "tests_failed", "deploy_failed", "superseded", "cancelled", "invalid", "unavailable"];

function Filters({ query }) {
  const set = (name) => (value) => replaceQuery({ ...route.peek().query, [name]: value });
  return html`
    <form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
      ${isAdmin() && html`<label>User <${FilterInput} class="mono" value=${query.user_id ?? ""} placeholder="any" onChange=${set("user_id")} /></label>`}
      <label>Repl <${FilterInput} class="mono" value=${query.repl_id ?? ""} placeholder="any" onChange=${set("repl_id")} /></label>
      <label>Status
        <select value=${query.status ?? ""} onChange=${(event) => set("status")(event.currentTarget.value)}>
          <option value="">any</option>
          ${STATUSES.map((status) => html`<option key=${status} value=${status}>${status.replaceAll("_", " ")}</option>`)}
        </select>
      </label>
    </form>
  `;
}

function Row({ item, selected, query }) {
  return html`
    <li>
      <a class="row" href=${href("submissions", item.submission_id, query)} aria-current=${selected ? "true" : undefined}
        data-submission=${item.submission_id}>
        <${StatusBadge} status=${item.status} />
        <span class="row-main">
          <span class="row-title">${item.repl_id}${item.release != null && html` <span class="muted">release ${item.release}</span>`}</span>
          <span class="muted row-sub">${[item.user_id, item.language, item.reason?.replaceAll("_", " ")].filter(Boolean).join(" · ")}</span>
        </span>
        <span class="row-end"><${Time} value=${item.time} /><span class="muted">${duration(item.duration_ms)}</span></span>
      </a>
    </li>
  `;
}

function useList(query) {
  const filter = { user_id: query.user_id, repl_id: query.repl_id, status: query.status };
  const key = JSON.stringify(filter);
  const first = useLoaded((signal) => api.submissions({ ...filter, limit: PAGE }, signal), key,
    { pollMs: () => POLL_MS, refresh: finishedRuns.value });
  const [older, setOlder] = useState({ items: [], next: undefined, problem: null });
  useEffect(() => setOlder({ items: [], next: undefined, problem: null }), [key]);
  const next = older.next === undefined ? first.data?.next : older.next;
  const more = async () => {
    try {
      const page = await api.submissions({ ...filter, limit: PAGE, before: next });
      setOlder({ items: [...older.items, ...page.submissions], next: page.next ?? null, problem: null });
    } catch (problem) {
      setOlder({ ...older, problem });
    }
  };
  const known = new Set();
  const items = [...(first.data?.submissions ?? []), ...older.items].filter(
    ({ submission_id: id }) => !known.has(id) && known.add(id),
  );
  return { items, next, more, loading: first.loading, problem: first.problem ?? older.problem, reload: first.reload };
}

export function SubmissionsPanel() {
  const { id, query } = route.value;
  const { items, next, more, loading, problem, reload } = useList(query);
  const filtered = Boolean(query.user_id || query.repl_id || query.status);
  return html`
    <div class=${`split ${id ? "has-detail" : ""}`}>
      <div class="split-list">
        <${Filters} query=${query} />
        <${ProblemNote} problem=${problem} retry=${reload} />
        ${loading && !items.length && html`<p class="muted pad">Loading…</p>`}
        ${!loading && !problem && !items.length && (filtered
          ? html`<${Empty} title="Nothing matches">Change or clear the filters above.<//>`
          : html`<${Empty} title="No submissions yet">Run a program in the <a href=${href("run")}>Run</a> tab, or send one with <code>gantry submit app.py</code>.<//>`)}
        <ul class="rows" data-testid="submissions">
          ${items.map((item) => html`<${Row} key=${item.submission_id} item=${item} selected=${item.submission_id === id} query=${query} />`)}
        </ul>
        ${next && html`<button type="button" class="small more" onClick=${more}>Show older</button>`}
      </div>
      <div class="split-detail">
        ${id
          ? html`<a class="back" href=${href("submissions", null, query)}>← All submissions</a><${SubmissionView} key=${id} id=${id} />`
          : html`<${Empty} title="No submission chosen">Choose one to see its code, its stages and its output.<//>`}
      </div>
    </div>
  `;
}
