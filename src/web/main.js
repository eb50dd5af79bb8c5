// Entry: take a one-time token out of the address before anything else can read it, then mount the page.
import { html, render } from "./vendor/preact.js";
import { takeTokenFromAddress } from "./router.js";
import { beginSession } from "./session.js";
import { App } from "./app.js";

const token = takeTokenFromAddress();
render(html`<${App} />`, document.getElementById("app"));
beginSession(token);
