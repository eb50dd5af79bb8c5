// The Logs tab: search and filters in the address, and following that stands still while the person reads further up.
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/preact.js";
import { LogFeed } from "./log-follow.js";
import { STAGES } from "./record.js";
import { isAdmin } from "./session.js";
import { href, replaceQuery, route } from "./router.js";
import { Empty, FilterInput, ProblemNote } from "./ui.js";
import { count, duration, fullTime, logTime } from "./format.js";

/** Those that records have; the server refuses others. */
const LEVELS = ["info", "warn", "error"];
/** Closer to the end than this counts as "at the end". */
const END_SLACK_PX = 40;

function Filters({ query, follow, setFollow }) {
  const set = (name) => (value) => replaceQuery({ ...route.peek().query, [name]: value });
  const pick = (name) => (event) => set(name)(event.currentTarget.value);
  return html`
    <form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
      <label class="grow">Search <${FilterInput} type="search" value=${query.q ?? ""} placeholder="words in the message"
        data-testid="log-search" onChange=${set("q")} /></label>
      <label>Level
        <select value=${query.level ?? ""} data-testid="log-level" onChange=${pick("level")}>
          <option value="">any</option>${LEVELS.map((level) => html`<option key=${level} value=${level}>${level}</option>`)}
        </select></label>
      <label>Step
        <select value=${query.step ?? ""} data-testid="log-step" onChange=${pick("step")}>
          <option value="">any</option>${STAGES.map((step) => html`<option key=${step} value=${step}>${step}</option>`)}
        </select></label>
      ${isAdmin() && html`<label>User <${FilterInput} class="mono short" value=${query.user_id ?? ""} placeholder="any" onChange=${set("user_id")} /></label>`}
      <label>Repl <${FilterInput} class="mono short" value=${query.repl_id ?? ""} placeholder="any" onChange=${set("repl_id")} /></label>
      <label>Submission <${FilterInput} class="mono" value=${query.submission_id ?? ""} placeholder="any" onChange=${set("submission_id")} /></label>
      <label class="inline check"><input type="checkbox" checked=${follow} data-testid="log-follow"
        onChange=${(event) => setFollow(event.currentTarget.checked)} /> Follow</label>
    </form>
  `;
}

function Fields({ record }) {
  const id = record["gantry.submission_id"];
  return html`
    <div class="log-fields">
      <dl>
        ${Object.entries(record).map(([name, value]) => html`
          <div key=${name}><dt>${name}</dt><dd>${typeof value === "string" ? value : JSON.stringify(value)}</dd></div>`)}
      </dl>
      ${id && html`<a href=${href("submissions", id)}>Open the submission</a>`}
    </div>
  `;
}

function LogRow({ record }) {
  const [open, setOpen] = useState(false);
  const level = record["log.level"] ?? "info";
  const took = record["event.duration"];
  const message = record.message ?? record["error.message"] ?? "";
  return html`
    <li class=${`log-row ${level}`}>
      <button type="button" class="log-line" aria-expanded=${open} onClick=${() => setOpen(!open)}>
        <time datetime=${record["@timestamp"]} title=${fullTime(record["@timestamp"])}>${logTime(record["@timestamp"])}</time>
        <span class="log-level">${level}</span>
        <span class="log-action">${record["event.action"] ?? record["gantry.step"] ?? ""}</span>
        <span class="log-message">${message.trimEnd()}</span>
        ${Number.isFinite(took) && html`<span class="log-took muted">${duration(took / 1e6)}</span>`}
      </button>
      ${open && html`<${Fields} record=${record} />`}
    </li>
  `;
}

const rowKeys = new WeakMap();
let nextRowKey = 1;

/** Rows leave from the top: an index would make every other row redraw. */
function rowKey(record) {
  if (!rowKeys.has(record)) rowKeys.set(record, nextRowKey++);
  return rowKeys.get(record);
}

function useFeed(filterKey, follow) {
  const feed = useMemo(() => new LogFeed(JSON.parse(filterKey)), [filterKey]);
  useEffect(() => {
    feed.load().then(() => feed.follow(feed.wanted));
    return () => feed.close();
  }, [feed]);
  useEffect(() => {
    feed.wanted = follow;
    if (!feed.loading.peek()) feed.follow(follow);
  }, [feed, follow]);
  return feed;
}

function LogList({ feed, follow }) {
  const list = useRef(null);
  const [paused, setPaused] = useState(false);
  const records = feed.records.value;

  const pause = (on) => {
    setPaused(on);
    feed.pause(on);
  };
  const jump = () => {
    pause(false);
    requestAnimationFrame(() => { list.current.scrollTop = list.current.scrollHeight; });
  };
  // Only while following does new text move the view.
  useLayoutEffect(() => {
    if (follow && !feed.paused) list.current.scrollTop = list.current.scrollHeight;
  }, [records, follow]);
  const onScroll = () => {
    const { scrollHeight, scrollTop, clientHeight } = list.current;
    pause(scrollHeight - scrollTop - clientHeight > END_SLACK_PX);
  };
  const pending = feed.pending.value;
  return html`
    <div class="log-box">
      <ol class="log-list" ref=${list} tabindex="0" aria-label="Log records" data-testid="logs" onScroll=${onScroll}>
        ${feed.dropped.value > 0 && html`<li key="dropped" class="muted pad">${count(feed.dropped.value, "older record")} not shown; narrow the search to see them.</li>`}
        ${records.map((record) => html`<${LogRow} key=${rowKey(record)} record=${record} />`)}
        ${feed.loading.value && !records.length && html`<li key="loading" class="muted pad">Loading…</li>`}
        ${!feed.loading.value && !records.length && !feed.problem.value && html`<li key="empty"><${Empty} title="No records">Nothing matches yet. ${
          follow ? "What comes in shows up here." : "Switch on Follow to see what comes in."}<//></li>`}
        ${feed.more.value && !follow && html`<li key="more" class="pad"><button type="button" class="small" onClick=${() => feed.load()}>Show more</button></li>`}
      </ol>
      ${follow && paused && html`<button type="button" class="jump" data-testid="jump" onClick=${jump}>
        ${pending ? `${pending.toLocaleString("en")} new, jump to end` : "Paused, jump to end"}</button>`}
    </div>
  `;
}

export function LogsPanel() {
  const { query } = route.value;
  const [follow, setFollow] = useState(true);
  const { user_id, repl_id, submission_id, step, level, q, since, until } = query;
  const filterKey = JSON.stringify({ user_id, repl_id, submission_id, step, level, q, since, until });
  const feed = useFeed(filterKey, follow);
  return html`
    <div class="logs-panel">
      <${Filters} query=${query} follow=${follow} setFollow=${setFollow} />
      <${ProblemNote} problem=${feed.problem.value} retry=${() => feed.load()} />
      <${LogList} key=${filterKey} feed=${feed} follow=${follow} />
    </div>
  `;
}
