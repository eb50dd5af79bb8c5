// Asks what a new repl is to be called and written in, and starts it.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { api } from "./api.js";
import { SAMPLES } from "./draft.js";
import { actAs, actingUser, isAdmin } from "./session.js";
import { href } from "./router.js";
import { ProblemNote, useLoaded } from "./ui.js";
import { attempt } from "./repl-state.js";

export function StartDialog({ close }) {
  const dialog = useRef(null);
  const [problem, fail] = useState(null);
  const [busy, setBusy] = useState(false);
  const [language, setLanguage] = useState(null);
  const { data, problem: unknown, reload } = useLoaded(() => api.languages(), "languages");
  const languages = data?.languages ?? [];
  const names = languages.map((one) => one.name);
  useEffect(() => dialog.current.showModal(), []);

  const start = async (event) => {
    event.preventDefault();
    const form = new FormData(event.currentTarget);
    const [replId, userId] = [form.get("repl").trim(), actingUser.peek().trim()];
    const { name: chosen, entrypoint } = languages.find((one) => one.name === language) ?? languages[0];
    setBusy(true);
    const done = await attempt(() => api.start({ replId, userId, language: chosen, files: { [entrypoint]: SAMPLES[chosen] ?? "" } }), fail);
    setBusy(false);
    if (!done) return;
    close();
    location.hash = href("repls", replId, { view: "workspace" });
  };
  return html`
    <dialog ref=${dialog} aria-labelledby="start-title" onCancel=${(event) => { event.preventDefault(); close(); }}>
      <form class="start-form" onSubmit=${start}>
        <h2 id="start-title">New repl</h2>
        <p class="muted">A workspace of its own with files, terminals and an address. Files that stand in the code store under its name are brought in.</p>
        <${ProblemNote} problem=${problem ?? unknown} retry=${problem ? undefined : reload} />
        <label>Name <input class="mono" name="repl" required maxlength="50" pattern="[a-z0-9]+(-+[a-z0-9]+)*" autofocus autocapitalize="off" autocomplete="off"
          spellcheck="false" placeholder="my-shop" title="Small letters, digits and hyphens: it becomes part of its address" data-testid="new-repl-name" /></label>
        <label>Language
          <select value=${language ?? names[0]} data-testid="new-repl-language" onChange=${(event) => setLanguage(event.currentTarget.value)}>
            ${names.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
          </select>
        </label>
        ${isAdmin() && html`<label>User <input class="mono" required maxlength="50" value=${actingUser.value} autocapitalize="off" spellcheck="false"
          data-testid="new-repl-user" onInput=${(event) => actAs(event.currentTarget.value)} /></label>`}
        <div class="dialog-actions">
          <button type="button" onClick=${close}>Cancel</button>
          <button type="submit" class="primary" disabled=${busy || !names.length} data-testid="start-repl">${busy ? "Starting…" : "Start it"}</button>
        </div>
      </form>
    </dialog>
  `;
}
