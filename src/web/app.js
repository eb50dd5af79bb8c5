// The shell: header, tabs, the panel that the address names. A new panel is one more line in PANELS.
import { html } from "./vendor/preact.js";
import { connection } from "./socket.js";
import { running } from "./run.js";
import { session, signOut } from "./session.js";
import { isDark, toggleTheme } from "./theme.js";
import { href, route } from "./router.js";
import { RunPanel } from "./run-panel.js";
import { SubmissionsPanel } from "./submissions-panel.js";
import { ReplsPanel } from "./repls-panel.js";
import { ModulesPanel } from "./modules-panel.js";
import { ServicesPanel } from "./services-panel.js";
import { LogsPanel } from "./logs-panel.js";
import { SignIn } from "./sign-in.js";
import { ConfirmDialog } from "./ui.js";

/** `keep`: stays mounted while another tab shows, so that the editor's history and the live run's output stay. */
const PANELS = [
  { tab: "run", title: "Run", panel: RunPanel, keep: true },
  { tab: "submissions", title: "Submissions", panel: SubmissionsPanel },
  { tab: "repls", title: "Repls", panel: ReplsPanel },
  { tab: "modules", title: "Modules", panel: ModulesPanel },
  { tab: "services", title: "Services", panel: ServicesPanel },
  { tab: "logs", title: "Logs", panel: LogsPanel },
];

const CONNECTION_WORDS = { idle: "Not connected", connecting: "Connecting…", online: "Connected", waiting: "Reconnecting…" };

function Connection() {
  const state = connection.value;
  return html`<span class=${`connection ${state}`} role="status" data-testid="connection" data-state=${state}>
    <span class="dot" aria-hidden="true"></span><span class="connection-words">${CONNECTION_WORDS[state]}</span></span>`;
}

function Who() {
  const { phase, role, userId } = session.value;
  if (phase !== "in") return null;
  return html`<span class="who" data-testid="who">${userId ?? role}</span>
    <button type="button" class="small" onClick=${signOut}>Sign out</button>`;
}

function ThemeToggle() {
  const dark = isDark();
  const label = dark ? "Switch to the light theme" : "Switch to the dark theme";
  return html`<button type="button" class="icon" aria-label=${label} title=${label} data-testid="theme" onClick=${toggleTheme}>
    <svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true">
      <circle cx="10" cy="10" r="7" fill="none" stroke="currentColor" stroke-width="1.6" />
      <path d=${dark ? "M10 3a7 7 0 0 0 0 14z" : "M10 3a7 7 0 0 1 0 14z"} fill="currentColor" />
    </svg></button>`;
}

function Header({ tab }) {
  const signedIn = session.value.phase === "in";
  return html`
    <header class="top">
      <a class="brand" href=${href("run")}><img src="/assets/favicon.svg" alt="" width="22" height="22" />Gantry</a>
      <nav aria-label="Panels">
        ${signedIn && PANELS.map(({ tab: name, title }) => html`
          <a key=${name} href=${href(name)} aria-current=${name === tab ? "page" : undefined} data-tab=${name}>${title}${
            name === "run" && running.value && html`<span class="running-dot" title="A run is going on"><span class="visually-hidden"> (running)</span></span>`}</a>`)}
      </nav>
      <div class="top-end">
        ${signedIn && html`<${Connection} />`}
        <${Who} />
        <${ThemeToggle} />
      </div>
    </header>
  `;
}

export function App() {
  const { phase } = session.value;
  const tab = PANELS.some((panel) => panel.tab === route.value.tab) ? route.value.tab : "run";
  return html`
    <${Header} tab=${tab} />
    ${phase === "out" && html`<${SignIn} />`}
    ${phase === "unknown" && html`<main class="waiting-room" aria-busy="true"></main>`}
    ${phase === "unreachable" && html`<main class="waiting-room"><p role="status">The server cannot be reached. Trying again…</p></main>`}
    ${phase === "in" && html`<main>
      ${PANELS.map(({ tab: name, title, panel: Panel, keep }) =>
        (keep || name === tab) && html`<section key=${name} class="panel" aria-label=${title} hidden=${name !== tab}><${Panel} /></section>`)}
    </main>`}
    <${ConfirmDialog} />
  `;
}
