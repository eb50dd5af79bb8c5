// The Run tab: editor and options on one side; stages, verdict and output on the other.
import { html, signal, useEffect, useRef } from "./vendor/preact.js";
import { api } from "./api.js";
import { connection } from "./socket.js";
import { code, language, options, setCode, setOption, submissionFields } from "./draft.js";
import { current, giveInput, running, start, stop, stopping } from "./run.js";
import { SubmissionRecord } from "./record.js";
import { actAs, actingUser, isAdmin, session } from "./session.js";
import { href } from "./router.js";
import { Editor } from "./editor.js";
import { OutputPane } from "./output.js";
import { RunOptions } from "./run-options.js";
import { Stages } from "./stages.js";
import { Verdict } from "./verdict.js";

const languages = signal(["python"]);
/** Why the run could not be sent. */
const refusal = signal(null);
const nothingYet = new SubmissionRecord(null);

async function loadLanguages() {
  try {
    const answer = await api.languages();
    const names = answer.languages.map((one) => one.name);
    if (!names.length) return;
    languages.value = names;
    if (!names.includes(language.peek())) language.value = names[0];
  } catch {
    // The default stays; the connection state in the header says that the server is away.
  }
}

function runNow() {
  if (running.peek()) return;
  const userId = actingUser.peek().trim();
  refusal.value = userId ? start(submissionFields(userId)) : "Name the user to run as.";
}

const DOING = {
  receive: "Taking in the submission",
  sandbox: "Preparing the sandbox",
  install: "Installing packages",
  compile: "Compiling",
  test: "The program is running",
  publish: "Storing the release",
  deploy: "Starting the release",
  ready: "Waiting until the release answers",
};

function progressOf(run, record) {
  if (!run) return { title: "Ready", detail: "Write a program and press Run. What it prints shows up here as it runs." };
  if (stopping.value) return { title: "Stopping", detail: "Asking for the run to be cancelled." };
  if (connection.value !== "online" && record.reply.value === null) {
    return { title: "Running", detail: "The connection is lost; the run goes on, and this page picks it up again." };
  }
  if (record.queued.value) return { title: "Queued", detail: "Waiting for a free place." };
  const stages = Object.entries(record.stages.value);
  const [name] = stages.findLast(([, stage]) => stage.state === "started") ?? [];
  return { title: "Running", detail: `${DOING[name] ?? "Working"}…` };
}

function UserField() {
  if (!isAdmin()) return null;
  return html`<label class="inline">User
    <input class="mono user-field" value=${actingUser.value} maxlength="50" autocapitalize="off" spellcheck="false"
      data-testid="user" onInput=${(event) => actAs(event.currentTarget.value)} /></label>`;
}

function Toolbar() {
  const isRunning = running.value;
  return html`
    <div class="toolbar">
      <${UserField} />
      <label class="inline">Language
        <select value=${language.value} data-testid="language" onChange=${(event) => { language.value = event.currentTarget.value; }}>
          ${languages.value.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
        </select>
      </label>
      <label class="inline check">
        <input type="checkbox" checked=${options.value.deploy} data-testid="deploy"
          onChange=${(event) => setOption("deploy", event.currentTarget.checked)} /> Deploy
      </label>
      <span class="spring"></span>
      ${isRunning
        ? html`<button type="button" key="stop" class="stop" data-testid="stop" disabled=${stopping.value} onClick=${stop}>Stop</button>`
        : html`<button type="button" key="run" class="primary" data-testid="run" title="Ctrl+Enter" onClick=${runNow}>Run</button>`}
    </div>
  `;
}

/** A line of input for the program that runs; shown while it may take one. */
function InputLine({ run }) {
  const field = useRef(null);
  if (run.record.reply.value !== null || !run.inputOpen.value) return null;
  const away = connection.value !== "online";
  const give = (event) => {
    event.preventDefault();
    if (giveInput(`${field.current.value}\n`)) field.current.value = "";
  };
  const refused = run.inputRefused.value;
  return html`
    <form class="input-line" onSubmit=${give} data-testid="input-line">
      <input class="mono" ref=${field} aria-label="Input for the program" placeholder=${away ? "Reconnecting…" : "Input for the program; Enter sends it"}
        autocapitalize="off" autocomplete="off" spellcheck="false" data-testid="input" />
      <button type="submit" class="small" disabled=${away} data-testid="give-input">Send</button>
      <button type="button" class="small" disabled=${away} title="The program reads the end of its input" data-testid="end-input"
        onClick=${() => giveInput("", true)}>End of input</button>
      ${refused && html`<p class="note bad" role="alert">${[refused.message, refused.cause, refused.remediation].filter(Boolean).join(". ")}</p>`}
    </form>
  `;
}

export function RunPanel() {
  const signedIn = session.value.phase === "in";
  useEffect(() => {
    if (signedIn) loadLanguages();
  }, [signedIn]);
  const run = current.value;
  const record = run?.record ?? nothingYet;
  const reply = record.reply.value;
  return html`
    <div class="run-panel">
      <div class="write">
        <${Toolbar} />
        ${refusal.value && html`<p class="note bad" role="alert">${refusal.value}</p>`}
        <${Editor} text=${code} language=${language.value} onChange=${(text) => setCode(text)} onSubmit=${runNow} />
        <${RunOptions} userId=${actingUser.value} />
        <p class="hint muted"><kbd>Ctrl</kbd>+<kbd>Enter</kbd> runs. <kbd>Esc</kbd> then <kbd>Tab</kbd> leaves the editor.</p>
      </div>
      <div class="watch">
        <${Stages} stages=${record.stages.value} />
        <${Verdict} reply=${reply} progress=${progressOf(run, record)} tests=${record.tests.value} />
        <${OutputPane} name="stdout" buffer=${record.stdout}
          placeholder=${reply ? "Nothing was printed." : "Standard output"} />
        ${run && html`<${InputLine} key=${record.id} run=${run} />`}
        <${OutputPane} name="stderr" buffer=${record.stderr}
          placeholder=${reply ? "Nothing was printed." : "Standard error"} />
        <p class="hint muted">${run
          ? html`Submission <a class="mono" href=${href("submissions", record.id)} data-testid="submission-id">${record.id}</a>`
          : " "}</p>
      </div>
    </div>
  `;
}
