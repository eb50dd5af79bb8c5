// A reporter of Node's test runner, which tells Gantry's runner about each test on a descriptor that
// is nobody else's: Node runs each test file in a process of its own, and none of these has it.
//
// The descriptor comes with a word that is new for each run. It is the first line that can be read
// there, and the first word of every line that is written.
import { readSync, writeSync } from 'node:fs';
import { resolve } from 'node:path';
import { inspect } from 'node:util';

const DESCRIPTOR = 3;
const MOST_MESSAGE = 8192;

function word() {
  const byte = Buffer.alloc(1);
  let read = '';
  while (!read.endsWith('\n')) {
    if (readSync(DESCRIPTOR, byte, 0, 1) === 0) throw new Error('the runner has gone');
    read += byte.toString('latin1');
  }
  return read.slice(0, -1);
}

const own = word();

// As they were named on the command line.
const files = new Set(process.argv.slice(1).map((file) => resolve(file)));

function say(what) {
  const line = Buffer.from(`${own} ${JSON.stringify(what)}\n`);
  for (let at = 0; at < line.length; ) at += writeSync(DESCRIPTOR, line, at);
}

export default async function* report(source) {
  let ended = 0;
  // Whether a test was reported at each depth, since the last one above it.
  const below = [];
  for await (const { type, data } of source) {
    if (type !== 'test:pass' && type !== 'test:fail') continue;
    const depth = data.nesting;
    const parent = below[depth + 1] === true;
    below.length = depth + 1;
    below[depth] = true;
    const error = data.details?.error;
    const group = parent || data.details?.type === 'suite';
    // What is above tests stands for them, unless it failed by itself.
    if (group && (type === 'test:pass' || error?.failureType === 'subtestsFailed')) continue;
    let outcome = type === 'test:pass' ? 'passed' : 'failed';
    // A file is reported when none of its tests was.
    if (outcome === 'passed' && depth === 0 && files.has(resolve(data.name))) outcome = 'empty';
    const marked = (mark) => mark !== undefined && mark !== false;
    if (marked(data.skip) || marked(data.todo)) outcome = 'skipped';
    const test = { name: data.name, outcome, ms: Math.trunc(data.details?.duration_ms ?? 0) };
    if (outcome === 'failed') {
      test.message = inspect(error?.cause ?? error).slice(0, MOST_MESSAGE);
    }
    ended += 1;
    say({ test });
  }
  say({ end: ended });
}
