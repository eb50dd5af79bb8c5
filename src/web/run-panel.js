// The Run tab: editor and options on one side; stages, verdict and output on the other.
import { html, signal, useEffect } from "./vendor/preact.js";
import { api } from "./api.js";
import { connection } from "./socket.js";
import { code, language, options, setCode, setOption, submissionFields } from "./draft.js";
import { current, running, start, stop, stopping } from "./run.js";
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
        <${Editor} value=${code.value} language=${language.value} onChange=${(text) => setCode(text)} onSubmit=${runNow} />
        <${RunOptions} userId=${actingUser.value} />
        <p class="hint muted"><kbd>Ctrl</kbd>+<kbd>Enter</kbd> runs. <kbd>Esc</kbd> then <kbd>Tab</kbd> leaves the editor.</p>
      </div>
      <div class="watch">
        <${Stages} stages=${record.stages.value} />
        <${Verdict} reply=${reply} progress=${progressOf(run, record)} tests=${record.tests.value} />
        <${OutputPane} name="stdout" buffer=${record.stdout}
          placeholder=${reply ? "Nothing was printed." : "Standard output"} />
        <${OutputPane} name="stderr" buffer=${record.stderr}
          placeholder=${reply ? "Nothing was printed." : "Standard error"} />
        <p class="hint muted">${run
          ? html`Submission <a class="mono" href=${href("submissions", record.id)} data-testid="submission-id">${record.id}</a>`
          : " "}</p>
      </div>
    </div>
  `;
}
