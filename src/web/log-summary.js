// Above the records of the Logs tab: when they were made, and chips that narrow to a level or a step.
import { html } from "./vendor/preact.js";
import { count, fullTime, when } from "./format.js";

/** Bars of the histogram: narrower ones cannot be hit with a mouse. */
const BARS = 60;
const LEVELS = ["error", "warn", "info"];
const HEIGHT = 44;

const time = (record) => Date.parse(record["@timestamp"]);
const level = (record) => (LEVELS.includes(record["log.level"]) ? record["log.level"] : "info");

/** Counts by level in stretches of equal length from the first record to the last. */
export function buckets(records) {
  const times = records.map(time).filter(Number.isFinite);
  if (!times.length) return [];
  const first = times.reduce((a, b) => Math.min(a, b));
  const last = times.reduce((a, b) => Math.max(a, b));
  const width = Math.max(1, Math.ceil((last - first + 1) / BARS));
  const all = Array.from({ length: Math.ceil((last - first + 1) / width) }, (_, index) => ({
    from: first + index * width, to: Math.min(last, first + (index + 1) * width - 1), info: 0, warn: 0, error: 0, total: 0,
  }));
  for (const record of records) {
    const at = time(record);
    if (!Number.isFinite(at)) continue;
    const bucket = all[Math.floor((at - first) / width)];
    bucket[level(record)] += 1;
    bucket.total += 1;
  }
  return all;
}

/** `choose({since, until})` narrows to one bar. */
export function Histogram({ records, choose }) {
  const bars = buckets(records);
  if (!bars.length) return null;
  const most = bars.reduce((most, bar) => Math.max(most, bar.total), 1);
  const words = (bar) => `${fullTime(bar.from)}: ${count(bar.total, "record")}`
    + (bar.error ? `, ${count(bar.error, "error")}` : "") + (bar.warn ? `, ${count(bar.warn, "warning")}` : "");
  return html`
    <figure class="histogram" data-testid="histogram" data-total=${records.length}>
      <div class="bars" role="group" aria-label="Records over time">
        ${bars.map((bar) => html`
          <button type="button" key=${bar.from} class="bar" title=${words(bar)} aria-label=${words(bar)} disabled=${!bar.total}
            onClick=${() => choose({ since: new Date(bar.from).toISOString(), until: new Date(bar.to + 1).toISOString() })}>
            ${LEVELS.map((name) => bar[name] > 0 && html`
              <span key=${name} class=${name} style=${{ height: `${Math.max(2, (bar[name] / most) * HEIGHT)}px` }}></span>`)}
          </button>`)}
      </div>
      <figcaption class="muted"><span>${when(bars[0].from)}</span><span>${count(records.length, "record")} shown</span><span>${when(bars.at(-1).to)}</span></figcaption>
    </figure>
  `;
}

/** One of `values` or none; each with how many of the records shown have it. */
export function Chips({ name, values, chosen, of, records, choose }) {
  const counts = new Map();
  for (const record of records) counts.set(record[of], (counts.get(record[of]) ?? 0) + 1);
  return html`
    <div class="chips" role="group" aria-label=${name}>
      <span class="muted">${name}</span>
      ${values.map((value) => html`
        <button type="button" key=${value} class="chip" aria-pressed=${chosen === value} data-testid=${`chip-${value}`}
          onClick=${() => choose(chosen === value ? "" : value)}>${value}${
          counts.has(value) && html`<span class="chip-count">${counts.get(value).toLocaleString("en")}</span>`}</button>`)}
    </div>
  `;
}
