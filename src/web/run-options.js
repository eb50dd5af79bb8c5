// The optional parts of a run behind a disclosure: the repl, standard input and test cases.
import { html } from "./vendor/preact.js";
import { options, setOption } from "./draft.js";
import { count } from "./format.js";

const EMPTY_CASE = { name: "", stdin: "", args: "", expected: "" };

function TestCase({ index, value, change, remove }) {
  const set = (field) => (event) => change({ ...value, [field]: event.currentTarget.value });
  return html`
    <fieldset class="case">
      <legend>Case ${index + 1}</legend>
      <label>Name <input value=${value.name} placeholder=${`case ${index + 1}`} onInput=${set("name")} /></label>
      <label>Arguments <input class="mono" value=${value.args} placeholder="--flag 'two words'" onInput=${set("args")} /></label>
      <label>Standard input <textarea rows="2" class="mono" value=${value.stdin} onInput=${set("stdin")}></textarea></label>
      <label>Expected output <textarea rows="2" class="mono" value=${value.expected} onInput=${set("expected")}></textarea></label>
      <button type="button" class="small" onClick=${remove}>Remove case ${index + 1}</button>
    </fieldset>
  `;
}

function summary({ stdin, interactive, cases, replId }) {
  const set = [];
  if (replId.trim()) set.push(`repl ${replId.trim()}`);
  if (interactive && !cases.length) set.push("input while it runs");
  else if (stdin) set.push("standard input");
  if (cases.length) set.push(count(cases.length, "test case"));
  return set.join(", ") || "repl, standard input, test cases";
}

export function RunOptions({ userId }) {
  const value = options.value;
  // A test case has input of its own.
  const typed = value.interactive && !value.cases.length;
  const setCase = (index, changed) => setOption("cases", value.cases.map((one, i) => (i === index ? changed : one)));
  return html`
    <details class="run-options">
      <summary>Options <span class="muted">${summary(value)}</span></summary>
      <div class="run-options-body">
        <label>Repl id
          <input class="mono" value=${value.replId} placeholder=${`${userId || "user"}-prod`} maxlength="50" autocapitalize="off"
            onInput=${(event) => setOption("replId", event.currentTarget.value)} />
        </label>
        <label>Standard input
          <textarea rows="3" class="mono" data-testid="stdin-field" value=${value.stdin} disabled=${typed}
            onInput=${(event) => setOption("stdin", event.currentTarget.value)}></textarea>
        </label>
        <label class="inline check"><input type="checkbox" data-testid="interactive" checked=${typed} disabled=${value.cases.length > 0}
          onChange=${(event) => setOption("interactive", event.currentTarget.checked)} /> Type the input while the program runs</label>
        <div class="cases">
          <p class="muted">Without test cases the program runs once and passes with exit code 0. With them, each case runs it and compares its standard output.</p>
          ${value.cases.map((one, i) => html`
            <${TestCase} key=${i} index=${i} value=${one} change=${(changed) => setCase(i, changed)}
              remove=${() => setOption("cases", value.cases.filter((_, j) => j !== i))} />`)}
          <button type="button" class="small" data-testid="add-case"
            onClick=${() => setOption("cases", [...value.cases, EMPTY_CASE])}>Add a test case</button>
        </div>
      </div>
    </details>
  `;
}
