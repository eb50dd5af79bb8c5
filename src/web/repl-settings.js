// What a repl runs with and keeps beside its code: variables and secrets, domains of its own, replicas, data.
import { html, useEffect, useState } from "./vendor/preact.js";
import { api } from "./api.js";
import { attempt, isIdle, isStopped } from "./repl-state.js";
import { ProblemNote, confirmed, useLoaded } from "./ui.js";
import { bytes, count } from "./format.js";

/** The server's own bound. */
const MAX_REPLICAS = 20;

/** A row of the form. A secret's value is never sent to the page; left empty it stays as it is. */
const rowsOf = ({ env, secrets }) => [
  ...Object.entries(env).map(([name, value]) => ({ name, value, secret: false, known: false })),
  ...secrets.map((name) => ({ name, value: "", secret: true, known: true })),
];

function VariableRow({ row, at, change, remove }) {
  const label = row.name || `variable ${at + 1}`;
  return html`
    <li class="variable">
      <input class="mono" aria-label=${`Name of ${label}`} placeholder="NAME" required pattern="[A-Za-z_][A-Za-z0-9_]*" title="Letters, digits and _; no digit first"
        value=${row.name} autocapitalize="off" spellcheck="false" data-field="name" onInput=${(event) => change({ name: event.currentTarget.value })} />
      <input class="mono" aria-label=${`Value of ${label}`} type=${row.secret ? "password" : "text"} autocomplete="off" spellcheck="false"
        placeholder=${row.known ? "stays as it is" : "value"} value=${row.value} data-field="value" onInput=${(event) => change({ value: event.currentTarget.value })} />
      <label class="inline check"><input type="checkbox" checked=${row.secret} disabled=${row.known} data-field="secret"
        onChange=${(event) => change({ secret: event.currentTarget.checked })} /> secret</label>
      <button type="button" class="small danger-quiet" aria-label=${`Remove ${label}`} onClick=${remove}>Remove</button>
    </li>`;
}

function Variables({ repl, reload }) {
  const loaded = useLoaded((signal) => api.variables(repl.replId, signal), `env ${repl.replId}`);
  const [rows, setRows] = useState(null);
  const [problem, fail] = useState(null);
  const [busy, setBusy] = useState(false);
  const { data } = loaded;
  useEffect(() => {
    if (data) setRows(rowsOf(data));
  }, [data]);
  if (loaded.problem) return html`<${ProblemNote} problem=${loaded.problem} retry=${loaded.reload} />`;
  if (!rows) return html`<p class="muted">Loading…</p>`;

  const change = (at) => (fields) => setRows(rows.map((row, i) => (i === at ? { ...row, ...fields } : row)));
  const save = async (event) => {
    event.preventDefault();
    const twice = rows.find(({ name }, at) => rows.findIndex((row) => row.name === name) !== at);
    if (twice) {
      fail({ title: `${twice.name} is there twice`, remediation: "Remove one of them: a variable has one value." });
      return;
    }
    const of = (secret) => rows.filter((row) => row.secret === secret);
    const body = {
      env: Object.fromEntries(of(false).map(({ name, value }) => [name, value])),
      secrets: Object.fromEntries(of(true).map(({ name, value, known }) => [name, known && !value ? null : value])),
    };
    setBusy(true);
    await attempt(async () => setRows(rowsOf(await api.setVariables(repl.replId, body))), fail);
    setBusy(false);
    reload();
  };
  // The fields rest while they are saved: what was saved is put over what is typed meanwhile.
  return html`
    <form class="variables" onSubmit=${save} data-testid="variables">
      <${ProblemNote} problem=${problem} />
      ${!rows.length && html`<p class="muted">No variables yet. The program reads them from its environment.</p>`}
      <fieldset disabled=${busy}>
        <ul>${rows.map((row, at) => html`<${VariableRow} key=${at} row=${row} at=${at} change=${change(at)} remove=${() => setRows(rows.filter((_, i) => i !== at))} />`)}</ul>
      </fieldset>
      <p class="record-links">
        <button type="button" class="small" disabled=${busy} data-testid="add-variable" onClick=${() => setRows([...rows, { name: "", value: "", secret: false, known: false }])}>Add a variable</button>
        <button type="submit" class="small primary" disabled=${busy} data-testid="save-variables">${busy ? "Saving…" : isStopped(repl) ? "Save" : "Save and start anew"}</button>
      </p>
    </form>
  `;
}

/** What is to be in the DNS before a domain is taken. */
function Proofs({ problem }) {
  return html`
    <div class="note" role="alert">
      <strong>${problem.title}</strong>
      <p>To show that it is yours, put this into the DNS and add the domain again. It may take some minutes until the DNS has it.</p>
      <ul>${problem.proofs.map((proof) => html`<li key=${proof.domain} class="mono proof" data-testid="proof">${proof.name} ${proof.type} ${proof.value}</li>`)}</ul>
    </div>
  `;
}

function Domains({ repl, reload }) {
  const [problem, fail] = useState(null);
  const [busy, setBusy] = useState(false);
  const [wanted, setWanted] = useState("");
  const domains = repl.domains ?? [];
  const give = async (names) => {
    setBusy(true);
    const done = await attempt(() => api.setDomains(repl.replId, names), fail);
    setBusy(false);
    if (done) setWanted("");
    reload();
  };
  return html`
    <div class="domains" data-testid="domains">
      ${problem?.proofs?.length > 0 ? html`<${Proofs} problem=${problem} />` : html`<${ProblemNote} problem=${problem} />`}
      ${domains.length > 0 && html`<ul>${domains.map((name) => html`
        <li key=${name} class="variable"><span class="mono">${name}</span>
          <button type="button" class="small danger-quiet" disabled=${busy} aria-label=${`Remove ${name}`} onClick=${() => give(domains.filter((one) => one !== name))}>Remove</button></li>`)}</ul>`}
      <form class="record-links" onSubmit=${(event) => { event.preventDefault(); give([...domains, wanted.trim()]); }}>
        <label class="inline">Domain <input class="mono" required value=${wanted} placeholder="shop.example.com" autocapitalize="off" spellcheck="false"
          data-testid="domain" onInput=${(event) => setWanted(event.currentTarget.value)} /></label>
        <button type="submit" class="small" disabled=${busy} data-testid="add-domain">${busy ? "Looking it up…" : "Add"}</button>
      </form>
    </div>
  `;
}

function Scale({ repl, reload }) {
  const { autoscale } = repl;
  const [auto, setAuto] = useState(Boolean(autoscale));
  const [problem, fail] = useState(null);
  const [busy, setBusy] = useState(false);
  const scale = async (event) => {
    event.preventDefault();
    const form = new FormData(event.currentTarget);
    const number = (name) => Number(form.get(name));
    const wanted = auto ? { min: number("min"), max: number("max"), cpu_percent: number("cpu") } : { replicas: number("replicas") };
    setBusy(true);
    await attempt(() => api.scaleRepl(repl.replId, wanted), fail);
    setBusy(false);
    reload();
  };
  const field = (name, label, value, most) => html`<label class="inline">${label}
    <input type="number" name=${name} min="1" max=${most} step="1" required defaultValue=${value} data-testid=${`scale-${name}`} /></label>`;
  return html`
    <form class="scale-repl" onSubmit=${scale} data-testid="scale">
      <${ProblemNote} problem=${problem} />
      <p class="record-links">
        <label class="inline check"><input type="checkbox" checked=${auto} data-testid="autoscale" onChange=${(event) => setAuto(event.currentTarget.checked)} /> by processor time</label>
        ${auto
          ? html`${field("min", "from", autoscale?.min ?? 1, MAX_REPLICAS)} ${field("max", "to", autoscale?.max ?? 3, MAX_REPLICAS)} ${field("cpu", "at % of what one requests", autoscale?.cpu_percent ?? 70, 1_000)}`
          : field("replicas", "Replicas", repl.replicas || 1, MAX_REPLICAS)}
        <button type="submit" class="small" disabled=${busy} data-testid="scale-repl">${busy ? "Scaling…" : "Scale"}</button>
      </p>
    </form>
  `;
}

function Data({ repl, reload }) {
  // Counted again when the repl starts or stops.
  const loaded = useLoaded((signal) => api.data(repl.replId, signal), `data ${repl.replId} ${repl.state}`);
  const [problem, fail] = useState(null);
  const [busy, setBusy] = useState(false);
  const { data } = loaded;
  if (loaded.problem) return html`<${ProblemNote} problem=${loaded.problem} retry=${loaded.reload} />`;
  if (!data) return html`<p class="muted">Loading…</p>`;

  const remove = async () => {
    const yes = await confirmed({
      title: `Delete the data of ${repl.replId}?`,
      detail: "Its database, and everything else that its program kept, is gone for good. Its code and releases stay.",
      action: "Delete the data",
    });
    if (!yes) return;
    setBusy(true);
    await attempt(() => api.deleteData(repl.replId), fail);
    setBusy(false);
    loaded.reload();
    reload();
  };
  const of = (used, most) => [used == null ? "an unknown amount" : bytes(used) || "0 B", most != null && `of at most ${bytes(most)}`].filter(Boolean).join(" ");
  const none = data.bytes === 0;
  const stopped = isStopped(repl) && !isIdle(repl);
  return html`
    <div class="data" data-testid="data">
      <${ProblemNote} problem=${problem} />
      <p>${none ? "It keeps nothing beside its code." : `Its database and files take ${of(data.bytes, data.limit_bytes)}.`}${
        data.user_bytes != null ? html` <span class="muted">All data and releases of ${repl.userId}: ${of(data.user_bytes, data.user_limit_bytes)}.</span>` : null}</p>
      ${!none && html`<p class="record-links">
        <button type="button" class="small danger-quiet" disabled=${busy || !stopped} data-testid="delete-data" onClick=${remove}>${busy ? "Deleting…" : "Delete the data…"}</button>
        ${!stopped && html`<span class="muted">Stop the repl first: its program uses them.</span>`}
      </p>`}
    </div>
  `;
}

export function Settings({ repl, reload }) {
  // Loaded when it is looked at.
  const [open, setOpen] = useState(false);
  const domains = repl.domains?.length ? count(repl.domains.length, "domain") : "";
  return html`
    <details class="raw settings" data-testid="settings" onToggle=${(event) => setOpen(event.currentTarget.open)}>
      <summary>Variables, domains, replicas, data <span class="muted">${[domains, repl.replicas > 1 && count(repl.replicas, "replica")].filter(Boolean).join(" · ")}</span></summary>
      ${open && html`<div class="settings-body">
        <h3>Variables</h3>
        <${Variables} repl=${repl} reload=${reload} />
        <h3>Domains of its own</h3>
        <${Domains} repl=${repl} reload=${reload} />
        <h3>Replicas</h3>
        <${Scale} repl=${repl} reload=${reload} />
        <h3>Data</h3>
        <${Data} repl=${repl} reload=${reload} />
      </div>`}
    </details>
  `;
}
