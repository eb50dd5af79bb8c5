// The verdict in words: what happened, why, what it cost, which tests failed, and where the program now lives.
import { html } from "./vendor/preact.js";
import { bytes, count, duration } from "./format.js";
import { lineDiff } from "./diff.js";
import { statusTone } from "./ui.js";

const REASONS = {
  exit_code: (reply) => `The program ended with exit code ${reply.exit_code ?? "other than 0"}.`,
  signal: (reply) => `The program was ended by a signal${reply.signal ? ` (${reply.signal})` : ""}.`,
  timeout: () => "It ran longer than its time limit and was stopped.",
  cpu: () => "It used more CPU time than its limit and was stopped.",
  memory: () => "It used more memory than its limit and was stopped.",
  output: () => "It wrote more output than its limit and was stopped.",
  disk: () => "It wrote more to disk than its limit.",
  compile: (reply) => (reply.error ? "It could not be built." : "It could not be compiled."),
  tests: (reply) => {
    const tests = reply.tests ?? [];
    // Of very many tests not all are listed.
    const counts = reply.test_counts ?? { failed: tests.filter((test) => outcome(test) === "failed").length };
    const all = reply.test_counts ? Object.values(counts).reduce((sum, one) => sum + one, 0) : tests.length;
    return counts.failed ? `${counts.failed} of ${count(all, "test")} failed.` : "Its tests failed.";
  },
};

/** How a test ended; records of older servers only say whether it passed. */
const outcome = (test) => test.outcome ?? (test.passed ? "passed" : "failed");

const TEST_MARKS = { passed: ["ok", "✓"], failed: ["bad", "✕"], skipped: ["", "–"], todo: ["", "–"] };

const HEADLINES = {
  deployed: "Deployed",
  tests_passed: "Tests passed",
  tests_failed: "Failed",
  deploy_failed: "Tests passed, deploying failed",
  superseded: "Tests passed, not deployed",
  cancelled: "Cancelled",
  invalid: "Not accepted",
  unavailable: "No verdict",
};

function explanation(reply) {
  switch (reply.status) {
    case "deployed":
      return `The tests passed and release ${reply.release ?? ""} is serving.`.replace("release  is", "the release is");
    case "tests_passed":
      return "The program passed; nothing was deployed.";
    case "tests_failed":
      return REASONS[reply.reason]?.(reply) ?? "The program failed.";
    case "deploy_failed":
      return "The new release did not come up; the previous release, if there was one, still serves.";
    case "superseded":
      return "What was asked of this repl later stands, so this was not deployed.";
    case "cancelled":
      return "It was stopped because you asked for it.";
    case "invalid":
      return "The submission was wrong, so nothing was run.";
    case "unavailable":
      return "Gantry could not finish this or does not know how it ended. This is not your program's fault.";
    default:
      return "";
  }
}

function Facts({ reply }) {
  const facts = [
    ["Exit code", reply.exit_code],
    ["Signal", reply.signal],
    ["Time", duration(reply.duration_ms)],
    ["CPU", duration(reply.usage?.cpu_ms)],
    ["Memory", bytes(reply.usage?.memory_bytes)],
    ["Release", reply.release],
  ].filter(([, value]) => value !== undefined && value !== null && value !== "");
  if (!facts.length) return null;
  return html`
    <dl class="facts">
      ${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd data-fact=${name}>${String(value)}</dd></div>`)}
    </dl>
  `;
}

function Diff({ expected, actual }) {
  const { lines, hidden } = lineDiff(expected, actual);
  const marks = { same: " ", expected: "−", actual: "+" };
  const names = { expected: "expected: ", actual: "actual: " };
  return html`
    <div class="diff-key"><span class="expected">− expected</span> <span class="actual">+ actual</span></div>
    <pre class="diff" tabindex="0" aria-label="Difference between expected and actual output">
      ${lines.map(
        ({ kind, text }) => html`<span class=${`diff-line ${kind}`}><span aria-hidden="true">${marks[kind]} </span>${
          names[kind] && html`<span class="visually-hidden">${names[kind]}</span>`}${text}${"\n"}</span>`,
      )}
      ${hidden > 0 && html`<span class="diff-line same">${`… ${count(hidden, "more line")}`}</span>`}
    </pre>
  `;
}

function Test({ test }) {
  const comparable = typeof test.expected === "string" && typeof test.actual === "string";
  const ended = outcome(test);
  const [tone, mark] = TEST_MARKS[ended] ?? ["", "?"];
  const leftOut = ended === "skipped" || ended === "todo";
  const label = html`
    <span class=${`test-mark ${tone}`} aria-hidden="true">${mark}</span>
    <span class="visually-hidden">${leftOut ? "" : ended}</span>
    <span class="test-name">${test.name}</span>
    ${leftOut && html`<span class="muted">${ended}</span>`}
    <span class="muted">${duration(test.duration_ms)}</span>
  `;
  if (ended !== "failed") return html`<li class=${`test ${ended}`}>${label}</li>`;
  return html`
    <li class="test failed">
      <details open><summary>${label}</summary>
        ${test.message && html`<pre class="test-message" tabindex="0">${test.message}</pre>`}
        ${comparable && html`<${Diff} expected=${test.expected} actual=${test.actual} />`}
        ${["stdout", "stderr"].map(
          (name) => test[name] && html`<pre class="test-message" tabindex="0" aria-label=${name}>${test[name]}</pre>`,
        )}
      </details>
    </li>
  `;
}

export function Tests({ tests }) {
  if (!tests.length) return null;
  const failedFirst = [...tests].sort((a, b) => Number(outcome(b) === "failed") - Number(outcome(a) === "failed"));
  return html`<ul class="tests" aria-label="Tests">${failedFirst.map((test, i) => html`<${Test} key=${i} test=${test} />`)}</ul>`;
}

/** A link only when it is one: a URL of the server's answer with any other scheme stays text. */
export function AppLink({ url }) {
  if (!/^https?:\/\//.test(url ?? "")) return url ? html`<span>${url}</span>` : null;
  return html`<a class="app-link" href=${url} target="_blank" rel="noopener noreferrer">${url}<span aria-hidden="true"> ↗</span>
    <span class="visually-hidden">(opens a new tab)</span></a>`;
}

function ErrorDetails({ error }) {
  if (!error) return null;
  return html`
    <div class="error-details">
      ${error.message && html`<p><strong>${error.message}</strong></p>`}
      ${error.cause && error.cause !== error.message && html`<p class="pre-line">${error.cause}</p>`}
      ${error.remediation && html`<p>${error.remediation}</p>`}
    </div>
  `;
}

/** `reply` is null while the submission runs; then `progress` says what it is doing. */
export function Verdict({ reply, progress, tests }) {
  return html`
    <div class=${`verdict ${reply ? statusTone(reply.status) : "live"}`} data-testid="verdict" data-status=${reply?.status ?? "running"}>
      <div aria-live="polite" aria-atomic="true">
        <h2>${reply ? (HEADLINES[reply.status] ?? reply.status) : progress.title}</h2>
        <p>${reply ? explanation(reply) : progress.detail}</p>
      </div>
      ${reply?.url && html`<p class="deployed-at"><${AppLink} url=${reply.url} /></p>`}
      ${reply && html`<${ErrorDetails} error=${reply.error} />`}
      ${reply?.truncated && html`<p class="muted">The output went past its limit; what is kept of it ends there.</p>`}
      ${reply && html`<${Facts} reply=${reply} />`}
      <${Tests} tests=${tests} />
    </div>
  `;
}
