// Who is signed in. `unknown` until the server has said so, then `out` or `in`.
import { signal, batch } from "./vendor/preact.js";
import { api, setUnauthorizedHandler } from "./api.js";
import { count } from "./format.js";
import { keyOf, remembered, tabMemory } from "./storage.js";
import { connect, disconnect } from "./socket.js";
import { forgetDraft } from "./draft.js";
import { forgetRun } from "./run.js";
import { forgetWorkspaces, unsavedFiles } from "./kept.js";
import { takeTokenFromAddress } from "./router.js";
import { confirmed } from "./ui.js";

/** More names of files make a question that nobody reads. */
const MOST_NAMED = 3;
/** Whom an admin acts for until another is named. */
const USUAL_USER = "dev";
/** Between attempts to learn who is signed in while the server is away. */
const RETRY_MS = 2_000;

export const session = signal({ phase: "unknown" });
/** Why the last attempt to sign in failed, for the form. */
export const signInProblem = signal(null);
/** The user an admin acts for; a user's own id otherwise. */
export const actingUser = signal(remembered.read("user", USUAL_USER));

export const isAdmin = () => session.value.role === "admin";

export function actAs(userId) {
  actingUser.value = userId;
  remembered.write("user", userId);
}

/** What this tab keeps belongs to whoever wrote it: the next person finds nothing of it. */
function forgetInThisTab() {
  forgetRun();
  forgetDraft();
  forgetWorkspaces();
  actingUser.value = USUAL_USER;
  tabMemory.remove("owner");
}

/** Nor of what the browser keeps for all its tabs, which do the same when they hear of it. */
function forgetPerson() {
  forgetInThisTab();
  for (const name of ["draft", "user", "owner"]) remembered.remove(name);
}

const nameOf = ({ role, user_id: userId }) => userId ?? role;

function signedIn(who) {
  const name = nameOf(who);
  // After a session that ended by itself somebody else may sign in.
  if ([remembered, tabMemory].some((memory) => memory.read("owner", name) !== name)) forgetPerson();
  remembered.write("owner", name);
  tabMemory.write("owner", name);
  batch(() => {
    session.value = { phase: "in", role: who.role, userId: who.user_id ?? null };
    signInProblem.value = null;
    if (who.user_id) actingUser.value = who.user_id;
  });
  connect();
}

function signedOut() {
  disconnect();
  session.value = { phase: "out" };
}

// Another tab signed out, or somebody else in: the tabs of a browser share one session.
addEventListener("storage", ({ key, newValue }) => {
  if (key !== keyOf("owner") || newValue === JSON.stringify(tabMemory.read("owner"))) return;
  forgetInThisTab();
  signedOut();
  if (newValue !== null) learnSession();
});

setUnauthorizedHandler(() => {
  if (session.peek().phase === "in") {
    signInProblem.value = { title: "The session ended", detail: "Sign in again to go on; running submissions are not affected." };
    signedOut();
  }
});

async function learnSession() {
  try {
    signedIn(await api.session());
  } catch (problem) {
    if (problem.status === 401 || problem.status === 403) signedOut();
    else {
      session.value = { phase: "unreachable" };
      setTimeout(learnSession, RETRY_MS);
    }
  }
}

/** Trades a key or a one-time token for the session cookie. */
export async function signIn(credentials) {
  try {
    await api.signIn(credentials);
    signedIn(await api.session());
    return true;
  } catch (problem) {
    signInProblem.value = problem.status === 401 ? refused(problem, "token" in credentials) : problem;
    return false;
  }
}

/** The server's advice is for programs that send headers; a person at the form needs another. */
function refused(problem, wasToken) {
  return {
    title: wasToken ? "The sign-in address does not work any more" : "The key was not accepted",
    reason: problem.reason,
    remediation: wasToken ? "Enter an API key instead." : "Check it for missing characters, or make a new one.",
  };
}

export async function signOut() {
  const unsaved = unsavedFiles();
  const yes = !unsaved.length || (await confirmed({
    title: `Sign out without saving ${count(unsaved.length, "file")}?`,
    detail: `What was typed into ${unsaved.slice(0, MOST_NAMED).join(", ")}${unsaved.length > MOST_NAMED ? " and others" : ""} is lost.`,
    action: "Sign out",
  }));
  if (!yes) return;
  try {
    await api.signOut();
  } catch (problem) {
    signInProblem.value = problem;
    if (problem.status !== 401) return;
  }
  forgetPerson();
  signedOut();
}

/** Called once at start with the token of the address, if there was one. */
export async function beginSession(token) {
  if (token && (await signIn({ token }))) return;
  // A used or expired token beside a cookie that still holds: the cookie wins and the token's failure is no news.
  await learnSession();
}

addEventListener("hashchange", () => {
  const token = takeTokenFromAddress();
  if (token) signIn({ token });
});
