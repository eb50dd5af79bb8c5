// The Services tab: nodes and services as they are, what happened to one, scaling it, ending it.
import { html, useEffect, useState } from "./vendor/preact.js";
import { api } from "./api.js";
import { route } from "./router.js";
import { Split } from "./split.js";
import { Empty, ProblemNote, Time, confirmed, useLoaded } from "./ui.js";
import { count, duration } from "./format.js";

/** A lost node is told within seconds; the server answers from memory, so asking often costs the cluster nothing. */
const POLL_MS = 1_000;
/** After a failure; without Kubernetes it stays one. */
const RETRY_MS = 10_000;
/** The server's own bound. */
const MAX_REPLICAS = 10_000;
/** Containers shown of one service: more cannot be read. */
const MAX_SHOWN = 100;

const TONE = { running: "ok", healthy: "ok", failed: "bad", in_queue: "live", completed: "quiet" };
const WORDS = { in_queue: "in queue" };
const EVENT_WORDS = { node_lost: "node lost", node_back: "node back" };
const EVENT_TONE = { node_lost: "bad", failed: "bad", ended: "warn", recovered: "ok", started: "ok", rescheduled: "live", placed: "live" };

const idOf = ({ userId, serviceName }) => `${userId}/${serviceName}`;

function State({ state }) {
  return html`<span class=${`badge ${TONE[state] ?? "quiet"}`} data-state=${state}>${WORDS[state] ?? state}</span>`;
}

function Nodes({ nodes }) {
  if (!nodes.length) return null;
  return html`
    <section class="nodes" aria-label="Nodes" data-testid="nodes">
      <h3>Nodes</h3>
      <ul>
        ${nodes.map((one) => html`
          <li key=${one.node} data-node=${one.node} title=${one.reason ?? ""}>
            <${State} state=${one.state} />
            <span class="mono">${one.node}</span>
            <span class="muted">${one.last_heartbeat && html`<${Time} value=${one.last_heartbeat} />`}</span>
            ${one.reason && html`<span class="muted node-reason">${one.reason}</span>`}
          </li>`)}
      </ul>
    </section>
  `;
}

function Containers({ containers }) {
  return html`
    <table class="releases" data-testid="containers">
      <thead><tr><th scope="col">Container</th><th scope="col">State</th><th scope="col">Node</th><th scope="col">Since</th></tr></thead>
      <tbody>
        ${containers.slice(0, MAX_SHOWN).map((one) => html`
          <tr key=${one.container}>
            <td class="mono">${one.container}${one.restarts > 0 && html`<span class="muted"> · ${count(one.restarts, "restart")}</span>`}</td>
            <td><${State} state=${one.state} />${one.reason && html`<div class="muted reason">${one.reason}</div>`}</td>
            <td class="mono">${one.node ?? "–"}</td>
            <td><${Time} value=${one.since} /></td>
          </tr>`)}
      </tbody>
    </table>
    ${containers.length > MAX_SHOWN && html`<p class="muted">and ${count(containers.length - MAX_SHOWN, "more container")}</p>`}
  `;
}

function Timeline({ service }) {
  const { data, problem, loading, reload } = useLoaded(
    (signal) => api.serviceEvents(service, signal), idOf(service), { pollMs: () => POLL_MS });
  if (problem && !data) return html`<${ProblemNote} problem=${problem} retry=${reload} />`;
  if (loading) return html`<p class="muted">Loading…</p>`;
  const events = [...data.events].reverse();
  return html`
    <table class="releases timeline" data-testid="timeline">
      <thead><tr><th scope="col">When</th><th scope="col">What</th><th scope="col">Container or node</th><th scope="col">Took</th></tr></thead>
      <tbody>
        ${events.map((one, i) => html`
          <tr key=${events.length - i} data-event=${one.event}>
            <td><${Time} value=${one.time} /></td>
            <td><span class=${`badge ${EVENT_TONE[one.event] ?? "quiet"}`}>${EVENT_WORDS[one.event] ?? one.event}</span>
              <div class="muted reason">${one.message}</div></td>
            <td class="mono">${one.container ?? one.node ?? ""}</td>
            <td>${duration(one.duration_ms)}</td>
          </tr>`)}
      </tbody>
    </table>
  `;
}

function Scale({ service, done, fail }) {
  const [wanted, setWanted] = useState(service.replicas);
  const [busy, setBusy] = useState(false);
  // Somebody else scaled it.
  useEffect(() => setWanted(service.replicas), [service.replicas]);
  const scale = async (event) => {
    event.preventDefault();
    setBusy(true);
    try {
      await api.scaleService(service, wanted);
      fail(null);
    } catch (error) {
      fail(error);
    }
    setBusy(false);
    done();
  };
  return html`
    <form class="scale" onSubmit=${scale}>
      <label for="replicas">Replicas</label>
      <input id="replicas" type="number" min="1" max=${MAX_REPLICAS} step="1" required value=${wanted} data-testid="replicas"
        onInput=${(event) => setWanted(event.currentTarget.valueAsNumber)} />
      <button type="submit" class="small" disabled=${busy || wanted === service.replicas || Number.isNaN(wanted)} data-testid="scale">Scale</button>
    </form>
  `;
}

function Detail({ service, containers, reload }) {
  const [problem, fail] = useState(null);
  const remove = async () => {
    const yes = await confirmed({
      title: `Delete ${service.serviceName}?`,
      detail: `Its ${count(service.replicas, "replica")} are stopped and nothing of it is kept.`,
      action: "Delete it",
    });
    if (!yes) return;
    try {
      await api.deleteService(service);
      fail(null);
    } catch (error) {
      fail(error);
    }
    reload();
  };
  return html`
    <article class="record">
      <header class="record-head"><h2 class="mono">${service.serviceName}</h2></header>
      <${ProblemNote} problem=${problem} />
      <dl class="facts">
        <div><dt>State</dt><dd><${State} state=${service.state} /></dd></div>
        <div><dt>Running</dt><dd data-testid="running">${service.current_state}/${service.replicas}</dd></div>
        <div><dt>Image</dt><dd class="mono">${service.image}</dd></div>
        <div><dt>User</dt><dd>${service.userId}</dd></div>
      </dl>
      ${service.reason && html`<div class=${`note ${service.state === "failed" ? "bad" : ""}`}><p class="pre-line">${service.reason}</p></div>`}
      <div class="record-links">
        <${Scale} service=${service} done=${reload} fail=${fail} />
        <button type="button" class="small danger-quiet" onClick=${remove} data-testid="delete-service">Delete…</button>
      </div>
      <h3>Timeline</h3>
      <${Timeline} service=${service} />
      <h3>Containers</h3>
      <${Containers} containers=${containers} />
    </article>
  `;
}

export function ServicesPanel() {
  const { id } = route.value;
  const loaded = useLoaded((signal) => api.state(signal), "state", { pollMs: (state) => (state ? POLL_MS : RETRY_MS) });
  const { problem } = loaded;
  const { nodes = [], containers = [], services = [], stale_since: stale } = loaded.data ?? {};
  if (problem?.status === 501) {
    return html`<div class="pad" data-testid="no-services"><${Empty} title="Services need Kubernetes">${problem.reason}. ${problem.remediation}<//></div>`;
  }
  return html`<${Split} tab="services" noun="service" id=${id} items=${services} idOf=${idOf} loaded=${loaded}
    above=${html`
      ${stale && html`<div class="note"><p>The cluster cannot be watched. What is shown is as it was at <${Time} value=${stale} />.</p></div>`}
      <${Nodes} nodes=${nodes} />`}
    row=${(one) => html`
      <${State} state=${one.state} />
      <span class="row-main">
        <span class="row-title">${one.serviceName}</span>
        <span class="muted row-sub">${one.userId} · ${one.image}</span>
      </span>
      <span class="row-end"><span>${one.current_state}/${one.replicas}</span></span>`}
    detail=${(one) => html`<${Detail} key=${id} service=${one} reload=${loaded.reload}
      containers=${containers.filter((container) => container.userId === one.userId && container.service === one.serviceName)} />`}
    none=${html`<${Empty} title="No services">An image that is posted to /service, or applied with gantry service apply, runs here with as many replicas as it should.<//>`}
    gone="It was deleted, or it is not yours." unchosen="Choose one to see where it runs and what happened to it." />`;
}
