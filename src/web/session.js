// Who is signed in. `unknown` until the server has said so, then `out` or `in`.
import { signal, batch } from "./vendor/preact.js";
import { api, setUnauthorizedHandler } from "./api.js";
import { remembered } from "./storage.js";
import { connect, disconnect } from "./socket.js";
import { forgetRun } from "./run.js";
import { forgetWorkspaces } from "./kept.js";
import { takeTokenFromAddress } from "./router.js";

/** Between attempts to learn who is signed in while the server is away. */
const RETRY_MS = 2_000;

export const session = signal({ phase: "unknown" });
/** Why the last attempt to sign in failed, for the form. */
export const signInProblem = signal(null);
/** The user an admin acts for; a user's own id otherwise. */
export const actingUser = signal(remembered.read("user", "dev"));

export const isAdmin = () => session.value.role === "admin";

export function actAs(userId) {
  actingUser.value = userId;
  remembered.write("user", userId);
}

function signedIn(who) {
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
  try {
    await api.signOut();
  } catch (problem) {
    signInProblem.value = problem;
    if (problem.status !== 401) return;
  }
  forgetRun();
  forgetWorkspaces();
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
