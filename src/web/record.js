// What is known of one submission: built from event frames and the reply, whether live, replayed or stored.
import { signal, batch } from "./vendor/preact.js";
import { TextBuffer } from "./text-buffer.js";

export const STAGES = ["receive", "sandbox", "install", "compile", "test", "publish", "deploy", "ready"];

/** More test results than a person reads; the record on the server has them all. */
const MAX_TESTS_SHOWN = 500;

const PASSED = new Set(["deployed", "tests_passed"]);
export const isPass = (status) => PASSED.has(status);

const waitingStages = () => Object.fromEntries(STAGES.map((name) => [name, { state: "waiting" }]));

export class SubmissionRecord {
  constructor(id) {
    this.id = id;
    this.stages = signal(waitingStages());
    this.tests = signal([]);
    this.queued = signal(false);
    this.reply = signal(null);
    this.stdout = new TextBuffer();
    this.stderr = new TextBuffer();
    this.lastSeq = 0;
  }

  /**
   * Applies one frame. A frame that came before is ignored, so replaying is always safe.
   * Returns `gap` when frames are missing before this one (it was not applied), `done` for the reply, else `applied` or `old`.
   */
  apply(frame) {
    const seq = Number.isInteger(frame.seq) ? frame.seq : null;
    const isReply = frame.event === undefined && typeof frame.status === "string";
    if (seq !== null) {
      if (seq > this.lastSeq + 1) return "gap";
      if (seq <= this.lastSeq && !isReply) return "old";
      this.lastSeq = Math.max(this.lastSeq, seq);
    }
    if (isReply) {
      this.finish(frame);
      return "done";
    }
    this.applyEvent(frame);
    return "applied";
  }

  applyEvent(frame) {
    switch (frame.event) {
      case "queued":
        this.queued.value = true;
        break;
      case "step":
        this.applyStep(frame);
        break;
      case "output":
        (frame.stream === "stderr" ? this.stderr : this.stdout).append(String(frame.data ?? ""));
        break;
      case "test":
        if (this.tests.peek().length < MAX_TESTS_SHOWN) this.tests.value = [...this.tests.peek(), frame];
        break;
      default:
      // A newer server may send more kinds.
    }
  }

  applyStep({ name, state, duration_ms, time }) {
    const before = this.stages.peek();
    if (!(name in before)) return;
    const started = state === "started" ? Date.parse(time) || Date.now() : before[name].started;
    this.queued.value = false;
    this.stages.value = { ...before, [name]: { state, duration: duration_ms, started } };
  }

  finish(reply) {
    batch(() => {
      const stages = {};
      for (const [name, stage] of Object.entries(this.stages.peek())) {
        if (stage.state === "waiting") stages[name] = { state: "skipped" };
        else if (stage.state === "started") stages[name] = { ...stage, state: isPass(reply.status) ? "passed" : "failed" };
        else stages[name] = stage;
      }
      this.stages.value = stages;
      this.queued.value = false;
      // A stored outcome may come without its events: then the reply's own copy is all there is.
      if (this.stdout.empty && reply.stdout) this.stdout.append(reply.stdout);
      if (this.stderr.empty && reply.stderr) this.stderr.append(reply.stderr);
      if (Array.isArray(reply.tests) && reply.tests.length) this.tests.value = reply.tests.slice(0, MAX_TESTS_SHOWN);
      this.reply.value = reply;
    });
  }
}

/** The record of `GET /submissions/{id}`. */
export function storedRecord({ submission_id, events, reply }) {
  const record = new SubmissionRecord(submission_id);
  for (const frame of events ?? []) {
    if (frame.event === undefined) continue;
    // A stored list may have been shortened by the server: a gap in it is not a lost frame.
    if (Number.isInteger(frame.seq)) record.lastSeq = Math.max(record.lastSeq, frame.seq - 1);
    record.apply(frame);
  }
  if (reply) record.finish(reply);
  return record;
}
