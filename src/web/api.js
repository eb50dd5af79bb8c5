// Same-origin HTTP with the session cookie. Every failure becomes a Problem with words a person can use.

/** No answer for this long means the server hangs; long enough for a rollback that waits until the release is ready. */
const REQUEST_TIMEOUT_MS = 60_000;

/** An RFC 9457 problem, or a failure to reach the server in the same shape. */
export class Problem extends Error {
  constructor({ status = 0, title, detail, code, cause, remediation, traceback, proofs }) {
    super(detail || title);
    this.name = "Problem";
    Object.assign(this, { status, title, detail, code, reason: cause, remediation, traceback, proofs });
  }
}

const text = (value) => (typeof value === "string" ? value : undefined);

async function problemFrom(response) {
  let body = {};
  if (/json/.test(response.headers.get("content-type") ?? "")) {
    body = await response.json().catch(() => ({}));
  }
  const detail = text(body?.detail) ?? text(body?.message);
  // A title that only repeats the status says less than the detail.
  const title = text(body?.title) === response.statusText ? undefined : text(body?.title);
  return new Problem({
    status: response.status,
    title: title ?? detail ?? `The server answered ${response.status} ${response.statusText}`.trim(),
    detail: title ? detail : undefined,
    code: text(body?.code),
    cause: text(body?.cause),
    remediation: text(body?.remediation),
    traceback: text(body?.exception?.traceback),
    // What a domain still has to show.
    proofs: Array.isArray(body?.proofs) ? body.proofs : undefined,
  });
}

let onUnauthorized = () => {};

/** Called whenever the server no longer accepts the cookie. */
export function setUnauthorizedHandler(handler) {
  onUnauthorized = handler;
}

/**
 * Sends one request and returns the parsed body (`null` for 204).
 * `query` values that are empty are left out.
 */
export async function request(method, path, { body, query, signal } = {}) {
  const filled = Object.entries(query ?? {}).filter(([, value]) => value !== "" && value != null);
  const search = filled.length ? `?${new URLSearchParams(filled)}` : "";
  const timeout = AbortSignal.timeout(REQUEST_TIMEOUT_MS);
  let response;
  try {
    response = await fetch(path + search, {
      method,
      headers: { accept: "application/json", ...(body === undefined ? {} : { "content-type": "application/json" }) },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
      credentials: "same-origin",
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem({
      title: "The server cannot be reached",
      detail: error.name === "TimeoutError" ? "It did not answer within a minute." : "The request did not get through.",
      remediation: "Check that gantry is running; the page reconnects by itself.",
    });
  }
  if (!response.ok) {
    // Signing in answers 401 for a wrong key: that is the form's business, not a lost session.
    if (response.status === 401 && path !== "/session") onUnauthorized();
    throw await problemFrom(response);
  }
  if (response.status === 204) return null;
  const answer = await response.text();
  if (!answer) return null;
  try {
    return JSON.parse(answer);
  } catch {
    throw new Problem({ status: response.status, title: "The server's answer is not JSON" });
  }
}

export const api = {
  session: () => request("GET", "/session"),
  signIn: (credentials) => request("POST", "/session", { body: credentials }),
  signOut: () => request("DELETE", "/session"),
  ticket: () => request("POST", "/ws/ticket"),
  languages: () => request("GET", "/languages"),
  submissions: (query, signal) => request("GET", "/submissions", { query, signal }),
  submission: (id, signal) => request("GET", `/submissions/${encodeURIComponent(id)}`, { signal }),
  start: (wanted) => request("POST", "/start", { body: wanted }),
  save: (replId) => request("POST", `/repls/${encodeURIComponent(replId)}/save`),
  repl: (replId, signal) => request("GET", `/repls/${encodeURIComponent(replId)}`, { signal }),
  repls: (signal) => request("GET", "/repls", { signal }),
  releases: (replId, signal) => request("GET", `/repls/${encodeURIComponent(replId)}/releases`, { signal }),
  rollback: (replId, release) =>
    request("POST", `/repls/${encodeURIComponent(replId)}/rollback`, { body: release == null ? {} : { release } }),
  variables: (replId, signal) => request("GET", `/repls/${encodeURIComponent(replId)}/env`, { signal }),
  setVariables: (replId, body) => request("PUT", `/repls/${encodeURIComponent(replId)}/env`, { body }),
  setDomains: (replId, domains) => request("PUT", `/repls/${encodeURIComponent(replId)}/domains`, { body: { domains } }),
  data: (replId, signal) => request("GET", `/repls/${encodeURIComponent(replId)}/data`, { signal }),
  deleteData: (replId) => request("DELETE", `/repls/${encodeURIComponent(replId)}/data`),
  /** Without a confirmation: the problem `not_confirmed`, which says what would be deleted. */
  deleteRepl: (replId, confirm) => request("DELETE", `/repls/${encodeURIComponent(replId)}`, { query: { confirm } }),
  scaleRepl: (replId, body) => request("POST", `/repls/${encodeURIComponent(replId)}/scale`, { body }),
  stop: (replId) => request("POST", "/stop", { body: { replId } }),
  state: (signal) => request("GET", "/state", { signal }),
  serviceEvents: ({ serviceName, userId }, signal) =>
    request("GET", `/service/${encodeURIComponent(serviceName)}/events`, { query: { userId }, signal }),
  scaleService: ({ serviceName, userId }, replicas) =>
    request("POST", "/service", { body: { userId, services: [{ serviceName, replicas }] } }),
  deleteService: ({ serviceName, userId }) =>
    request("DELETE", `/service/${encodeURIComponent(serviceName)}`, { query: { userId } }),
  modules: (signal) => request("GET", "/modules", { signal }),
  module: ({ module, user_id: userId }, namespace, signal) =>
    request("GET", `/modules/${encodeURIComponent(module)}`, { query: { userId, namespace }, signal }),
  createModule: (module, body) => request("POST", `/create_pod/${encodeURIComponent(module)}`, { body }),
  callModule: ({ module, user_id: userId }, method, body) =>
    request("POST", "/run_module", { query: { module_name: module, method_name: method, userId }, body }),
  removeModule: ({ module, user_id: userId }) =>
    request("DELETE", `/pod/${encodeURIComponent(module)}`, { query: { userId } }),
  logs: (query, signal) => request("GET", "/logs", { query, signal }),
};

/** The address of `GET /logs` for an EventSource. */
export function logsUrl(query) {
  const filled = Object.entries(query).filter(([, value]) => value !== "" && value != null);
  return `/logs?${new URLSearchParams(filled)}`;
}
