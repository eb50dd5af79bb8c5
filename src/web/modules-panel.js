// The Modules tab: modules with their functions and docstrings, a form to call one, its result.
import { html, useState } from "./vendor/preact.js";
import { api } from "./api.js";
import { href, route } from "./router.js";
import { Empty, ProblemNote, confirmed, useLoaded } from "./ui.js";
import { count, duration } from "./format.js";

/** A module that starts is ready within seconds. */
const POLL_MS = 2_000;
/** Functions shown at once; the filter finds the rest. */
const MAX_SHOWN = 300;

const TONE = { running: "ok", starting: "live", failed: "bad" };

const idOf = ({ user_id, module }) => `${user_id}/${module}`;

function State({ state }) {
  return html`<span class=${`badge ${TONE[state] ?? "quiet"}`} data-state=${state}>${state}</span>`;
}

function Create({ done }) {
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState(null);
  const create = async (event) => {
    event.preventDefault();
    const form = new FormData(event.currentTarget);
    const packages = form.get("packages").split(/[\s,]+/).filter(Boolean);
    setBusy(true);
    try {
      await api.createModule(form.get("module").trim(), packages.length ? { packages } : {});
      setProblem(null);
    } catch (error) {
      setProblem(error);
    }
    setBusy(false);
    done();
  };
  return html`
    <form class="module-create pad" onSubmit=${create}>
      <input name="module" required placeholder="Module, such as numpy" aria-label="Module" autocomplete="off" spellcheck="false" data-testid="module-name" />
      <input name="packages" placeholder="Packages, name==version" aria-label="Packages" autocomplete="off" spellcheck="false" data-testid="module-packages" />
      <button type="submit" class="small" disabled=${busy} data-testid="create-module">${busy ? "Starting…" : "Create"}</button>
      <${ProblemNote} problem=${problem} />
    </form>
  `;
}

/** What is typed as a JSON text, or the reason why it is none. */
function parsed(text, empty, name, fits) {
  if (!text.trim()) return { value: empty };
  try {
    const value = JSON.parse(text);
    return fits(value) ? { value } : { wrong: `${name} must be ${Array.isArray(empty) ? "a list, such as [16, 20, 24]" : "an object, such as {\"axis\": 0}"}` };
  } catch (error) {
    return { wrong: `${name}: ${error.message}` };
  }
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

function Outcome({ outcome }) {
  if (!outcome) return null;
  const { problem, answer, ms } = outcome;
  if (problem) {
    return html`<${ProblemNote} problem=${problem} />
      ${problem.traceback && html`<pre class="code-text" data-testid="traceback">${problem.traceback}</pre>`}`;
  }
  return html`
    <p class="muted">Took ${duration(ms)}${answer.called_with && " · the arguments were passed as one list"}</p>
    <pre class="code-text module-result" data-testid="module-result">${JSON.stringify(answer.result, null, 2)}</pre>
  `;
}

function CallForm({ module, name, signature, doc }) {
  const [outcome, setOutcome] = useState(null);
  const [wrong, setWrong] = useState(null);
  const [busy, setBusy] = useState(false);
  const call = async (event) => {
    event.preventDefault();
    const form = new FormData(event.currentTarget);
    const args = parsed(form.get("args"), [], "Arguments", Array.isArray);
    const kwargs = parsed(form.get("kwargs"), {}, "Named arguments", isObject);
    setWrong(args.wrong ?? kwargs.wrong ?? null);
    if (args.wrong || kwargs.wrong) return;
    setBusy(true);
    const begun = performance.now();
    try {
      const answer = await api.callModule(module, name, { args: args.value, kwargs: kwargs.value });
      setOutcome({ answer, ms: performance.now() - begun });
    } catch (problem) {
      setOutcome({ problem });
    }
    setBusy(false);
  };
  return html`
    <form class="module-call" onSubmit=${call} data-testid="call-form">
      <h3 class="mono">${name}<span class="muted">${signature}</span></h3>
      ${doc && html`<pre class="doc">${doc}</pre>`}
      <label>Arguments, a JSON list <textarea name="args" rows="2" spellcheck="false" placeholder="[16, 20, 24]" data-testid="call-args"></textarea></label>
      <label>Named arguments, a JSON object <textarea name="kwargs" rows="1" spellcheck="false" placeholder="{}" data-testid="call-kwargs"></textarea></label>
      ${wrong && html`<div class="note bad" role="alert" data-testid="call-wrong"><p>${wrong}</p></div>`}
      <button type="submit" disabled=${busy} data-testid="call">${busy ? "Running…" : "Call"}</button>
      <${Outcome} outcome=${outcome} />
    </form>
  `;
}

function Functions({ module }) {
  const [filter, setFilter] = useState("");
  const [namespace, setNamespace] = useState("");
  const [chosen, choose] = useState(null);
  const { data, problem, loading, reload } = useLoaded(
    (signal) => api.module(module, namespace, signal), `${idOf(module)}/${namespace}`);
  if (problem) return html`<${ProblemNote} problem=${problem} retry=${reload} />`;
  if (loading || !data) return html`<p class="muted">Loading…</p>`;
  const found = data.functions.filter((one) => one.name.toLowerCase().includes(filter.toLowerCase()));
  const full = (name) => (namespace ? `${namespace}.${name}` : name);
  const picked = data.functions.find((one) => full(one.name) === chosen);
  return html`
    ${data.doc && html`<p class="muted">${data.doc.split("\n\n")[0]}</p>`}
    <div class="module-parts">
      ${namespace && html`<button type="button" class="small" onClick=${() => setNamespace("")}>← ${module.module}</button>`}
      ${data.namespaces.map((name) => html`<button type="button" key=${name} class="chip" onClick=${() => setNamespace(full(name))}>${name}</button>`)}
    </div>
    ${picked && html`<${CallForm} key=${chosen} module=${module} name=${chosen} signature=${picked.signature} doc=${picked.doc} />`}
    <h3>${count(data.functions.length, "function")}${data.truncated && " and more"}</h3>
    <input type="search" class="module-filter" placeholder="Find a function" aria-label="Find a function" value=${filter} data-testid="function-filter"
      onInput=${(event) => setFilter(event.currentTarget.value)} />
    <ul class="rows functions" data-testid="functions">
      ${found.slice(0, MAX_SHOWN).map((one) => html`
        <li key=${one.name}>
          <button type="button" class="row" aria-current=${full(one.name) === chosen ? "true" : undefined} data-function=${one.name} onClick=${() => choose(full(one.name))}>
            <span class="row-main">
              <span class="row-title mono">${one.name}<span class="muted">${one.signature}</span></span>
              <span class="muted row-sub">${one.doc.split("\n")[0]}</span>
            </span>
          </button>
        </li>`)}
    </ul>
    ${found.length > MAX_SHOWN && html`<p class="muted">and ${count(found.length - MAX_SHOWN, "more function")}</p>`}
  `;
}

function Detail({ module, reload }) {
  const [problem, fail] = useState(null);
  const remove = async () => {
    const yes = await confirmed({
      title: `Remove ${module.module}?`,
      detail: `Its ${count(module.replicas, "pod")} are stopped; calls under way end.`,
      action: "Remove it",
    });
    if (!yes) return;
    try {
      await api.removeModule(module);
      fail(null);
    } catch (error) {
      fail(error);
    }
    reload();
  };
  return html`
    <article class="record">
      <header class="record-head"><h2 class="mono">${module.module}</h2></header>
      <${ProblemNote} problem=${problem} />
      <dl class="facts">
        <div><dt>State</dt><dd><${State} state=${module.state} /></dd></div>
        <div><dt>Pods</dt><dd data-testid="module-ready">${module.ready}/${module.replicas}</dd></div>
        <div><dt>User</dt><dd>${module.user_id}</dd></div>
        ${module.packages.length > 0 && html`<div><dt>Packages</dt><dd class="mono">${module.packages.join(" ")}</dd></div>`}
      </dl>
      ${module.cause && html`<div class=${`note ${module.state === "failed" ? "bad" : ""}`}><p class="pre-line">${module.cause}</p></div>`}
      <div class="record-links">
        <button type="button" class="small danger-quiet" onClick=${remove} data-testid="remove-module">Remove…</button>
      </div>
      ${module.state === "running" && html`<${Functions} module=${module} />`}
    </article>
  `;
}

export function ModulesPanel() {
  const { id } = route.value;
  const { data, problem, loading, reload } = useLoaded((signal) => api.modules(signal), "modules", { pollMs: () => POLL_MS });
  const { modules = [] } = data ?? {};
  const chosen = modules.find((one) => idOf(one) === id);
  return html`
    <div class=${`split ${id ? "has-detail" : ""}`}>
      <div class="split-list">
        <${Create} done=${reload} />
        <${ProblemNote} problem=${problem} retry=${reload} />
        ${loading && html`<p class="muted pad">Loading…</p>`}
        ${!loading && !problem && !modules.length && html`<${Empty} title="No modules">Name a Python module above: any function of it can be called then, from any language.<//>`}
        <ul class="rows" data-testid="modules">
          ${modules.map((one) => html`
            <li key=${idOf(one)}>
              <a class="row" href=${href("modules", idOf(one))} aria-current=${idOf(one) === id ? "true" : undefined}>
                <${State} state=${one.state} />
                <span class="row-main"><span class="row-title">${one.module}</span><span class="muted row-sub">${one.user_id}</span></span>
                <span class="row-end"><span>${one.ready}/${one.replicas}</span></span>
              </a>
            </li>`)}
        </ul>
      </div>
      <div class="split-detail">
        ${id && html`<a class="back" href=${href("modules")}>← All modules</a>`}
        ${chosen && html`<${Detail} key=${id} module=${chosen} reload=${reload} />`}
        ${id && !chosen && !loading && !problem && html`<${Empty} title="No such module">It was removed, or it is not yours.<//>`}
        ${!id && html`<${Empty} title="No module chosen">Choose one to see its functions and to call them.<//>`}
      </div>
    </div>
  `;
}
