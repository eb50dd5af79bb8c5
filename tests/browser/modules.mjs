// The page's modules without a picture: imported inside the real page, so that they run where they will be used.
import assert from "node:assert/strict";

/** Each check's function runs in the page; what it returns is compared here. */
export async function moduleChecks(checks, page) {
  await checks.check("a replayed frame changes nothing, a missing one is noticed, the reply ends it", async () => {
    const seen = await page.evaluate(async () => {
      const { SubmissionRecord } = await import("/assets/record.js");
      const record = new SubmissionRecord("id");
      const out = (seq, data) => record.apply({ event: "output", stream: "stdout", seq, data });
      const results = [out(1, "a"), out(2, "b"), out(2, "b"), out(1, "a"), out(4, "d"), out(3, "c"), out(4, "d")];
      results.push(record.apply({ status: "tests_failed", reason: "exit_code", seq: 5 }));
      return { results, text: record.stdout.text(), stages: record.stages.peek(), status: record.reply.peek().status };
    });
    assert.deepEqual(seen.results, ["applied", "applied", "old", "old", "gap", "applied", "applied", "done"]);
    assert.equal(seen.text, "abcd");
    assert.equal(seen.stages.deploy.state, "skipped");
    assert.equal(seen.status, "tests_failed");
  });
  await checks.check("output is bounded by lines and by characters, and counts what it dropped", async () => {
    const seen = await page.evaluate(async () => {
      const { TextBuffer, MAX_LINES, MAX_CHARS } = await import("/assets/text-buffer.js");
      const lines = new TextBuffer();
      for (let i = 0; i < 10_000; i++) lines.append(`${i}\n`);
      const long = new TextBuffer();
      for (let i = 0; i < 300; i++) long.append("x".repeat(9_999));
      const pairs = new TextBuffer();
      pairs.append(`a${"😀".repeat(40_000)}`);
      const torn = pairs.chunks.some(({ text }) => /[\ud800-\udbff]$/.test(text));
      return {
        MAX_LINES, MAX_CHARS, torn,
        kept: lines.lines, dropped: lines.droppedLines, end: lines.text().endsWith("\n9999\n"), wholeLine: /^\d+\n/.test(lines.text()),
        chars: long.chars, all: long.chars + long.droppedChars,
      };
    });
    assert.ok(seen.kept >= seen.MAX_LINES && seen.kept < 2 * seen.MAX_LINES, `${seen.kept} lines`);
    assert.equal(seen.kept + seen.dropped, 10_000);
    assert.ok(seen.end && seen.wholeLine);
    assert.ok(seen.chars >= seen.MAX_CHARS && seen.chars < 1.1 * seen.MAX_CHARS, `${seen.chars} characters`);
    assert.equal(seen.all, 300 * 9_999);
    assert.equal(seen.torn, false);
  });
  await checks.check("ids are UUIDv7 in the order of their time", async () => {
    const ids = await page.evaluate(async () => {
      const { uuidv7 } = await import("/assets/uuid.js");
      return [uuidv7(1_000), uuidv7(2_000), uuidv7(Date.now())];
    });
    for (const id of ids) assert.match(id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
    assert.deepEqual([...ids].sort(), ids);
  });
  await checks.check("arguments are split as a shell would", async () => {
    const split = await page.evaluate(async () => {
      const { splitArguments } = await import("/assets/draft.js");
      return ["a  b", "--x 'two words' \"and \\\" quote\"", "pre'fix'ed a\\ b", "'' x", "\"open"].map(splitArguments);
    });
    assert.deepEqual(split, [["a", "b"], ["--x", "two words", 'and " quote'], ["prefixed", "a b"], ["", "x"], ["open"]]);
  });
  await checks.check("a diff names what was expected and what came, also for large texts", async () => {
    const seen = await page.evaluate(async () => {
      const { lineDiff } = await import("/assets/diff.js");
      const many = (word) => Array.from({ length: 5_000 }, (_, i) => `${word} ${i}`).join("\n");
      const began = performance.now();
      const large = lineDiff(many("a"), many("b"));
      return { small: lineDiff("a\nb\nc\n", "a\nx\nc\n").lines, shown: large.lines.length, hidden: large.hidden, ms: performance.now() - began };
    });
    assert.deepEqual(seen.small, [
      { kind: "same", text: "a" }, { kind: "expected", text: "b" }, { kind: "actual", text: "x" }, { kind: "same", text: "c" },
    ]);
    assert.equal(seen.shown + seen.hidden, 10_000);
    assert.ok(seen.ms < 1_000, `${seen.ms} ms`);
  });
}
