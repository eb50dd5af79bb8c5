// The address's fragment is the page's location: `#/submissions/ID?status=deployed`.
import { signal } from "./vendor/preact.js";

const DEFAULT_TAB = "run";

function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [tab = "", ...rest] = path.split("/");
  let id = rest.join("/");
  try {
    id = decodeURIComponent(id);
  } catch {
    // A hand-typed, broken escape: use it as it stands.
  }
  return { tab: tab || DEFAULT_TAB, id: id || null, query: Object.fromEntries(new URLSearchParams(query)) };
}

/** The current location: `{tab, id, query}`. */
export const route = signal(parse(""));

const readAddress = () => {
  route.value = parse(location.hash);
};

/** The fragment for a location; empty query values are left out. */
export function href(tab, id = null, query = {}) {
  const filled = Object.entries(query).filter(([, value]) => value !== "" && value != null);
  const search = new URLSearchParams(filled).toString();
  return `#/${tab}${id ? `/${encodeURIComponent(id)}` : ""}${search ? `?${search}` : ""}`;
}

/** Changes the query in place: typing in a filter must not fill the browser's history. */
export function replaceQuery(query) {
  const { tab, id } = route.peek();
  history.replaceState(null, "", href(tab, id, query));
  readAddress();
}

/** Removes `#token=…` from the address and the history, and returns the token. */
export function takeTokenFromAddress() {
  const match = /^#token=([^&]+)/.exec(location.hash);
  if (match) history.replaceState(null, "", location.pathname);
  readAddress();
  return match ? match[1] : null;
}

addEventListener("hashchange", readAddress);
