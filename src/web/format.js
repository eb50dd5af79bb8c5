// Numbers and dates as people read them.

export function duration(ms) {
  if (ms == null || !Number.isFinite(ms)) return "";
  if (ms < 1) return "< 1 ms";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
  const minutes = Math.floor(ms / 60_000);
  return `${minutes} min ${Math.round((ms % 60_000) / 1000)} s`;
}

export function bytes(count) {
  if (count == null || !Number.isFinite(count)) return "";
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  let value = count;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const dayAndClock = new Intl.DateTimeFormat("en-GB", {
  day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit",
});
const full = new Intl.DateTimeFormat("en-GB", { dateStyle: "full", timeStyle: "long" });

function parse(time) {
  const date = new Date(time);
  return Number.isNaN(date.getTime()) ? null : date;
}

/** Today: the time alone; before: with the day. */
export function when(time) {
  const date = parse(time);
  if (!date) return "";
  return (date.toDateString() === new Date().toDateString() ? clock : dayAndClock).format(date);
}

export function fullTime(time) {
  const date = parse(time);
  return date ? full.format(date) : "";
}

/** `12:04:09.250`: log lines need the milliseconds. */
export function logTime(time) {
  const date = parse(time);
  if (!date) return "";
  return `${when(time)}.${String(date.getMilliseconds()).padStart(3, "0")}`;
}
