// The run of this tab: sends a submission, follows it, and picks it up again after a reload or a server restart.
import { signal, computed } from "./vendor/preact.js";
import { MAX_MESSAGE_BYTES, isOpen, messageBytes, onFrame, onOpen, send } from "./socket.js";
import { SubmissionRecord } from "./record.js";
import { tabMemory } from "./storage.js";
import { uuidv7 } from "./uuid.js";

/** The seq reached is written this often at most: it only says that frames came, the replay starts from 1 after a reload. */
const REMEMBER_EVERY_MS = 1_000;
/** Most input that waits for the server's word, in bytes: a quarter of what one message may hold, so that it fits a reload's memory too. */
const MAX_UNACKNOWLEDGED_BYTES = 256 * 1024;

const encoder = new TextEncoder();

/** What `newRun` makes, or null; the fields besides `record` are the protocol's state. */
export const current = signal(null);
export const stopping = signal(false);
/** Counts finished runs: lists reload when it changes. */
export const finishedRuns = signal(0);

export const running = computed(() => current.value !== null && current.value.record.reply.value === null);

let rememberTimer = null;

function remember() {
  clearTimeout(rememberTimer);
  rememberTimer = null;
  const run = current.peek();
  if (!run) return;
  tabMemory.write("run", {
    id: run.record.id,
    seq: run.record.lastSeq,
    finished: run.record.reply.peek() !== null,
    submission: run.submission,
    inputOpen: run.inputOpen.peek(),
    unacknowledged: run.unacknowledged,
    inputBytes: run.inputBytes,
  });
}

function rememberSoon() {
  rememberTimer ??= setTimeout(remember, REMEMBER_EVERY_MS);
}

function newRun(id, submission, inputOpen) {
  return {
    record: new SubmissionRecord(id),
    submission,
    sent: false,
    resuming: false,
    stopAsked: false,
    /** Whether the program takes more input. */
    inputOpen: signal(inputOpen),
    /** Why input did not reach it. */
    inputRefused: signal(null),
    /** Input that the server has not said it has on its disk, in order: `{offset, bytes, data}`. */
    unacknowledged: [],
    /** All input that was given, in bytes. */
    inputBytes: 0,
  };
}

function resumeFromLast(run) {
  run.resuming = true;
  send({ resume: run.record.id, after: run.record.lastSeq });
}

/** Starts a run. Returns a sentence when the submission cannot be sent as it is. */
export function start(fields) {
  const id = uuidv7();
  const submission = { ...fields, submission_id: id, stream: true };
  if (messageBytes(submission) > MAX_MESSAGE_BYTES) {
    return "The submission is larger than 1 MiB, the most one message may hold. Make the code or the test cases smaller.";
  }
  const run = newRun(id, submission, submission.interactive === true);
  current.value = run;
  stopping.value = false;
  run.sent = send(submission);
  remember();
  return null;
}

/** Asks for the run to be cancelled; asked again after a reconnect, because the first may not have arrived. */
export function stop() {
  const run = current.peek();
  if (!run || run.record.reply.peek()) return;
  run.stopAsked = true;
  stopping.value = true;
  send({ cancel: run.record.id });
}

/** Gives the program input, and with `eof` says that no more comes. False: it is not taken, and may be given again. */
export function giveInput(data, eof = false) {
  const run = current.peek();
  if (!run?.inputOpen.peek() || run.record.reply.peek()) return false;
  // Input overtakes no submission: the server would not know whose it is.
  if (!run.sent || !isOpen()) return false;
  const bytes = encoder.encode(data).length;
  const waiting = run.unacknowledged.reduce((sum, piece) => sum + piece.bytes, 0);
  if (waiting + bytes > MAX_UNACKNOWLEDGED_BYTES) {
    run.inputRefused.value = {
      message: "The input was not sent",
      cause: `${waiting} bytes wait until the server has them, and with these it would be more than ${MAX_UNACKNOWLEDGED_BYTES}`,
      remediation: "Send less at once, or send it again in a moment.",
    };
    return false;
  }
  const refusedBefore = run.inputRefused.peek() !== null;
  run.inputRefused.value = null;
  const piece = { offset: run.inputBytes, bytes, data };
  if (bytes > 0) run.unacknowledged.push(piece);
  run.inputBytes += bytes;
  if (eof) run.inputOpen.value = false;
  remember();
  // Behind what was refused nothing has its place: then all that waits is sent.
  if (refusedBefore) sendInputAgain(run);
  else send({ stdin: run.record.id, data, offset: piece.offset, eof });
  return true;
}

/** All input that the server may not have, and the end, which it never acknowledges: it passes over what it knows. */
function sendInputAgain(run) {
  for (const { offset, data } of run.unacknowledged) send({ stdin: run.record.id, data, offset });
  if (run.submission.interactive && !run.inputOpen.peek()) {
    send({ stdin: run.record.id, data: "", offset: run.inputBytes, eof: true });
  }
}

function inputReceived(run, received) {
  run.unacknowledged = run.unacknowledged.filter(({ offset, bytes }) => offset + bytes > received);
  rememberSoon();
}

/** Signing out: the next person at this page does not get the code or the output of this one. */
export function forgetRun() {
  clearTimeout(rememberTimer);
  rememberTimer = null;
  tabMemory.remove("run");
  current.value = null;
  stopping.value = false;
}

function finished(run) {
  stopping.value = false;
  run.resuming = false;
  remember();
  finishedRuns.value += 1;
}

/** The server does not know the id: the submission never reached it. The same id never runs twice, so sending it again is safe. */
function resend(run) {
  run.resuming = false;
  if (run.finishedBefore) {
    // It had ended before the reload and the server has forgotten it: nothing is to be run again.
    forgetRun();
    return;
  }
  if (run.stopAsked) {
    // Cancelled before it ever arrived: then it need not arrive.
    run.record.finish({ status: "cancelled" });
    finished(run);
    return;
  }
  run.sent = send(run.submission);
  sendInputAgain(run);
}

function handleGap(run, frame) {
  if (frame.event === undefined) {
    // The reply once more, and still frames are missing before it: the server no longer has them.
    run.gappedReplies = (run.gappedReplies ?? 0) + 1;
    if (run.gappedReplies > 1) {
      run.record.finish(frame);
      return finished(run);
    }
  }
  // One request per missing stretch: while the replay is on its way, the frames behind it keep coming.
  if (run.gapAfter === run.record.lastSeq) return;
  run.gapAfter = run.record.lastSeq;
  if (isOpen()) resumeFromLast(run);
  else console.warn("gantry: frames are missing before seq", frame.seq);
}

const refuses = (frame) => frame.event === undefined && (frame.status === "invalid" || Number.isInteger(frame.status));

onFrame((frame) => {
  const run = current.peek();
  if (!run || run.record.reply.peek()) return;
  const id = frame.submission_id ?? frame.resume ?? null;
  // A message that could not even be parsed is answered without an id; this page sends nothing for any other run.
  if (id !== null && id !== run.record.id) return;

  if (Number.isInteger(frame.received)) return inputReceived(run, frame.received);
  if (frame.event === undefined && frame.status === undefined && frame.error) {
    // Input that did not reach the program, which goes on.
    run.inputRefused.value = frame.error;
    return;
  }
  if (refuses(frame)) {
    if (run.resuming && frame.seq === undefined) return resend(run);
    if (Number.isInteger(frame.status)) frame = problemAsReply(frame);
    // The answer to a cancel or to input for what is not there (any more) is no verdict.
    if (frame.seq === undefined && frame.error?.code === "not_found") return;
  }
  const outcome = run.record.apply(frame);
  if (outcome === "gap") return handleGap(run, frame);
  if (outcome === "done") return finished(run);
  if (outcome === "applied") {
    run.resuming = false;
    rememberSoon();
  }
});

function problemAsReply({ title, detail, code, cause, remediation }) {
  return { status: "invalid", error: { code: code ?? "refused", message: title, cause: cause ?? detail, remediation } };
}

onOpen(() => {
  const run = current.peek();
  if (!run || run.record.reply.peek()) return;
  run.gapAfter = undefined;
  if (run.sent) {
    resumeFromLast(run);
    sendInputAgain(run);
  } else run.sent = send(run.submission);
  if (run.stopAsked) send({ cancel: run.record.id });
});

function restore() {
  const stored = tabMemory.read("run");
  if (!stored?.id || !stored.submission) return;
  // What was on screen is gone with the reload, so the replay starts from the first frame, not from `stored.seq`.
  current.value = {
    ...newRun(stored.id, stored.submission, stored.inputOpen === true),
    sent: true,
    finishedBefore: stored.finished,
    unacknowledged: stored.unacknowledged ?? [],
    inputBytes: stored.inputBytes ?? 0,
  };
}

restore();
addEventListener("pagehide", remember);
