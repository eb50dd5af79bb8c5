// The Logs tab: search and filters in the address, and following that stands still while the person reads further up.
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/preact.js";
import { LogFeed } from "./log-follow.js";
import { Chips, Histogram } from "./log-summary.js";
import { STAGES } from "./record.js";
import { isAdmin } from "./session.js";
import { href, replaceQuery, route } from "./router.js";
import { Empty, FilterInput, ProblemNote } from "./ui.js";
import { count, duration, fullTime, logTime, when } from "./format.js";

/** Those that records have; the server refuses others. */
const LEVELS = ["info", "warn", "error"];
/** Closer to the end than this counts as "at the end". */
const END_SLACK_PX = 40;

/** Changes some of the filters; they stand in the address, so it is a link to what is shown. */
const narrow = (changes) => replaceQuery({ ...route.peek().query, ...changes });

/** Fields whose value the server can look for, and the filter that does. */
const FILTER_OF = {
  "user.id": "user_id",
  "gantry.repl_id": "repl_id",
  "gantry.submission_id": "submission_id",
  "gantry.step": "step",
  "log.level": "level",
};
/** Longest piece of a message that is taken over into the search. */
const MAX_SEARCH = 200;

/** The filter that finds records with this field's value; null where the server has none. */
function filterOf(name, value) {
  if (name in FILTER_OF) return { [FILTER_OF[name]]: value };
  if (name === "@timestamp") return { since: value, until: value };
  if (name === "message" || name === "error.message") {
    const words = value.replaceAll('"', " ").trim().slice(0, MAX_SEARCH);
    return /[\p{L}\p{N}]/u.test(words) ? { q: `"${words}"` } : null;
  }
  return null;
}

/** Saves what is shown, one record a line. */
function download(records) {
  const lines = records.map((record) => `${JSON.stringify(record)}\n`);
  const url = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = `gantry-logs-${new Date().toISOString().replaceAll(":", "")}.ndjson`;
  link.click();
  URL.revokeObjectURL(url);
}

/** What is narrowed to, what is shown of it, and what is not. */
function Summary({ query, feed }) {
  const records = feed.records.value;
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    // Fixed in time: whoever opens the link sees these records, not newer ones.
    const last = records.at(-1)?.["@timestamp"];
    const address = href("logs", null, { ...query, since: query.since ?? records[0]?.["@timestamp"], until: query.until ?? last });
    await navigator.clipboard.writeText(location.origin + location.pathname + address);
    setCopied(true);
    setTimeout(() => setCopied(false), 1_500);
  };
  const missing = [
    feed.older.value && "older ones exist",
    feed.dropped.value > 0 && `${count(feed.dropped.value, "older record")} left the page`,
    feed.unread.value > 0 && `${count(feed.unread.value, "record")} could not be read`,
  ].filter(Boolean);
  return html`
    <div class="log-summary">
      <${Histogram} records=${records} choose=${narrow} />
      <div class="chip-rows">
        <${Chips} name="Level" values=${LEVELS} chosen=${query.level} of="log.level" records=${records} choose=${(level) => narrow({ level })} />
        <${Chips} name="Step" values=${STAGES} chosen=${query.step} of="gantry.step" records=${records} choose=${(step) => narrow({ step })} />
        <div class="chips">
          ${(query.since || query.until) && html`<button type="button" class="chip" aria-pressed="true" data-testid="chip-time"
            onClick=${() => narrow({ since: "", until: "" })}>${query.since ? when(query.since) : "…"} – ${query.until ? when(query.until) : "…"} ×</button>`}
          <span class="muted" data-testid="log-count">${count(records.length, "record")} shown${missing.length ? `; ${missing.join("; ")}` : ""}</span>
          <button type="button" class="small" data-testid="log-link" disabled=${!records.length} onClick=${copy}>${copied ? "Copied" : "Copy link"}</button>
          <button type="button" class="small" data-testid="log-download" disabled=${!records.length} onClick=${() => download(records)}>Download</button>
        </div>
      </div>
    </div>
  `;
}

function Filters({ query, follow, setFollow }) {
  const set = (name) => (value) => narrow({ [name]: value });
  return html`
    <form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
      <label class="grow">Search <${FilterInput} type="search" value=${query.q ?? ""} placeholder="words in the message"
        data-testid="log-search" onChange=${set("q")} /></label>
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
        ${Object.entries(record).map(([name, value]) => {
          const filter = typeof value === "string" ? filterOf(name, value) : null;
          return html`
          <div key=${name}><dt>${name}</dt><dd>${typeof value === "string" ? value : JSON.stringify(value)}${
            filter && html` <button type="button" class="only" title="Show only records with this value" data-testid=${`only-${name}`}
              onClick=${() => narrow(filter)}>only this</button>`}</dd></div>`;
        })}
      </dl>
      ${id && html`<a href=${href("submissions", id)}>Open the submission</a>`}
      <a href=${href("logs", null, { submission_id: id, since: record["@timestamp"], until: record["@timestamp"] })} data-testid="record-link">Link to this record</a>
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
    requestAnimationFrame(() => { if (list.current) list.current.scrollTop = list.current.scrollHeight; });
  };
  // Only while following does new text move the view.
  useLayoutEffect(() => {
    if (follow && !feed.paused) list.current.scrollTop = list.current.scrollHeight;
  }, [records, follow]);
  const onScroll = () => {
    // The last scrolling of a list that has just gone.
    if (!list.current) return;
    const { scrollHeight, scrollTop, clientHeight } = list.current;
    pause(scrollHeight - scrollTop - clientHeight > END_SLACK_PX);
  };
  const pending = feed.pending.value;
  return html`
    <div class="log-box">
      <ol class="log-list" ref=${list} tabindex="0" aria-label="Log records" data-testid="logs" onScroll=${onScroll}>
        ${(feed.older.value || feed.dropped.value > 0) && html`<li key="older" class="muted pad">Older records are not shown; narrow the search or the time to see them.</li>`}
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
      <${Summary} query=${query} feed=${feed} />
      <${ProblemNote} problem=${feed.problem.value} retry=${() => feed.load()} />
      <${LogList} key=${filterKey} feed=${feed} follow=${follow} />
    </div>
  `;
}
