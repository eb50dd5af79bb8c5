// The form for an API key. The printed one-time address signs in without it.
import { html, useState } from "./vendor/preact.js";
import { signIn, signInProblem } from "./session.js";
import { ProblemNote } from "./ui.js";

export function SignIn() {
  const [key, setKey] = useState("");
  const [busy, setBusy] = useState(false);
  const submit = async (event) => {
    event.preventDefault();
    if (!key.trim() || busy) return;
    setBusy(true);
    const done = await signIn({ key: key.trim() });
    setBusy(false);
    if (done) setKey("");
  };
  return html`
    <main class="sign-in">
      <form class="card" onSubmit=${submit}>
        <h1>Sign in to Gantry</h1>
        <p class="muted">Open the address that <code>gantry serve</code> printed when it started, or enter an API key.</p>
        <${ProblemNote} problem=${signInProblem.value} />
        <label>API key
          <input type="password" name="key" autocomplete="current-password" required autofocus value=${key}
            data-testid="key" onInput=${(event) => setKey(event.currentTarget.value)} />
        </label>
        <button type="submit" class="primary" disabled=${busy} data-testid="sign-in">${busy ? "Signing in…" : "Sign in"}</button>
        <p class="muted small-text">No key? <code>gantry key create</code> makes one on the machine where the server runs.</p>
      </form>
    </main>
  `;
}
