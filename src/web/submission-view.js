// One stored submission: code, stages, output, reply.
import { html, useMemo } from "./vendor/preact.js";
import { api } from "./api.js";
import { href } from "./router.js";
import { language, setCode } from "./draft.js";
import { storedRecord } from "./record.js";
import { OutputPane } from "./output.js";
import { Stages } from "./stages.js";
import { Verdict } from "./verdict.js";
import { ProblemNote, Time, useLoaded } from "./ui.js";

/** A submission that still runs is looked at again this often. */
const RUNNING_POLL_MS = 1_500;

/** `[path, text]` of every file; a submission sent as `code` has one. */
function filesOf(submission) {
  return submission.files
    ? Object.entries(submission.files).map(([path, text]) => [path, String(text)])
    : [[submission.entrypoint ?? "code", submission.code ?? ""]];
}

function openInEditor(submission) {
  const name = submission.language ?? "python";
  setCode(filesOf(submission)[0][1], name);
  language.value = name;
  location.hash = href("run");
}

function Code({ submission }) {
  const files = filesOf(submission);
  return html`
    <section class="record-code">
      ${files.map(([path, text]) => html`
        <details key=${path} open=${files.length === 1}>
          <summary class="mono">${path}</summary>
          <pre tabindex="0" class="code-text">${text}</pre>
        </details>`)}
    </section>
  `;
}

function Body({ data }) {
  const record = useMemo(() => storedRecord(data), [data]);
  const { submission = {}, reply } = data;
  return html`
    <header class="record-head">
      <h2 class="mono">${data.submission_id}</h2>
      <p class="muted">${data.user_id} · ${data.repl_id} · ${submission.language ?? "python"} · <${Time} value=${data.time} /></p>
      <p class="record-links">
        <a href=${href("logs", null, { submission_id: data.submission_id })}>Its log records</a>
        ${filesOf(submission).length === 1 && html`<button type="button" class="small" onClick=${() => openInEditor(submission)}>Open in the editor</button>`}
      </p>
    </header>
    <${Stages} stages=${record.stages.value} />
    <${Verdict} reply=${reply ?? null} progress=${{ title: "Running", detail: "It has not ended yet." }} tests=${record.tests.value} />
    <${Code} submission=${submission} />
    <${OutputPane} name="stdout" buffer=${record.stdout} placeholder="Nothing was printed." />
    <${OutputPane} name="stderr" buffer=${record.stderr} placeholder="Nothing was printed." />
    ${reply && html`<details class="raw"><summary>Reply as sent</summary><pre tabindex="0">${JSON.stringify(reply, null, 2)}</pre></details>`}
  `;
}

export function SubmissionView({ id }) {
  const { data, problem, loading, reload } = useLoaded((signal) => api.submission(id, signal), id,
    { pollMs: (latest) => (latest && !latest.reply ? RUNNING_POLL_MS : 0) });
  return html`
    <article class="record" data-testid="record">
      ${problem && html`<${ProblemNote} problem=${problem} retry=${reload} />`}
      ${loading && html`<p class="muted">Loading…</p>`}
      ${data && html`<${Body} data=${data} />`}
    </article>
  `;
}
