// A line diff of expected and actual output: small inputs by longest common subsequence, large ones only trimmed.

/** The table has rows x columns cells; above this the middle is shown as removed and added. */
const MAX_CELLS = 250_000;
/** Lines shown of one diff. */
const MAX_SHOWN = 200;

function common(a, b) {
  const width = b.length + 1;
  const table = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      table[i * width + j] =
        a[i] === b[j] ? table[(i + 1) * width + j + 1] + 1 : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  return { table, width };
}

function middle(a, b) {
  if (a.length * b.length > MAX_CELLS) {
    return [...a.map((text) => ({ kind: "expected", text })), ...b.map((text) => ({ kind: "actual", text }))];
  }
  const { table, width } = common(a, b);
  const lines = [];
  let i = 0;
  let j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      lines.push({ kind: "same", text: a[i] });
      i += 1;
      j += 1;
    } else if (j === b.length || (i < a.length && table[(i + 1) * width + j] >= table[i * width + j + 1])) {
      lines.push({ kind: "expected", text: a[i++] });
    } else {
      lines.push({ kind: "actual", text: b[j++] });
    }
  }
  return lines;
}

/** `{lines: [{kind: same|expected|actual, text}], hidden}`. */
export function lineDiff(expected, actual) {
  // The newline at the very end of both is no line of its own.
  const bothEnd = expected.endsWith("\n") && actual.endsWith("\n");
  const split = (text) => (bothEnd ? text.slice(0, -1) : text).split("\n");
  const a = split(expected);
  const b = split(actual);
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head += 1;
  let tail = 0;
  while (tail < a.length - head && tail < b.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail += 1;
  const same = (text) => ({ kind: "same", text });
  const lines = [
    ...a.slice(0, head).map(same),
    ...middle(a.slice(head, a.length - tail), b.slice(head, b.length - tail)),
    ...a.slice(a.length - tail).map(same),
  ];
  return { lines: lines.slice(0, MAX_SHOWN), hidden: Math.max(0, lines.length - MAX_SHOWN) };
}
