// A reporter of Node's test runner, which tells Gantry's runner about each test on a descriptor that
// is nobody else's: Node runs each test file in a process of its own, and none of these has it.
//
// The descriptor comes with a word that is new for each run. It is the first line that can be read
// there, and the first word of every line that is written.
import { readSync, writeSync } from 'node:fs';
import { relative, resolve } from 'node:path';
import { inspect } from 'node:util';

const DESCRIPTOR = 3;
const MOST_NAME = 1000;
const MOST_MESSAGE = 8192;
// Bytes of the whole report, of which the runner takes 1 MiB. Tests that held leave room for those that did
// not, and messages for names; beyond that, tests are counted.
const MOST_HELD = 400 << 10;
const MOST_MESSAGES = 800 << 10;
const MOST_REPORT = 950 << 10;

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

let said = 0;

// Whether there was room for it.
function say(what, most = Infinity) {
  const line = Buffer.from(`${own} ${JSON.stringify(what)}\n`);
  if (said + line.length > most) return false;
  said += line.length;
  for (let at = 0; at < line.length; ) at += writeSync(DESCRIPTOR, line, at);
  return true;
}

const untold = {};

function tell({ name, outcome, ms, message }) {
  const test = { name, outcome, ms };
  const failed = outcome === 'failed';
  if (failed && say({ test: { ...test, message } }, MOST_MESSAGES)) return;
  if (say({ test }, failed || outcome === 'empty' ? MOST_REPORT : MOST_HELD)) return;
  untold[outcome] = (untold[outcome] ?? 0) + 1;
}

// As it was sent: what is compiled has a folder of its own.
const fileName = (file) => relative(process.cwd(), file).replace(/^\.build\//, '');

const marked = (mark) => mark !== undefined && mark !== false;

function outcomeOf(type, data) {
  if (marked(data.skip)) return 'skipped';
  if (marked(data.todo)) return 'todo';
  if (type === 'test:fail') return 'failed';
  // A file is reported when none of its tests was.
  return data.nesting === 0 && files.has(resolve(data.name)) ? 'empty' : 'passed';
}

function nameOf(data, above) {
  if (data.nesting === 0 && files.has(resolve(data.name))) return fileName(resolve(data.name));
  const file = files.size > 1 && data.file ? [fileName(data.file)] : [];
  return [...file, ...above.slice(0, data.nesting), data.name].join(' > ').slice(0, MOST_NAME);
}

export default async function* report(source) {
  let ended = 0;
  // Whether a test was reported at each depth, since the last one above it.
  const below = [];
  // The names of what the next test is in, by depth.
  const above = [];
  for await (const { type, data } of source) {
    if (type === 'test:start') above[data.nesting] = data.name;
    if (type !== 'test:pass' && type !== 'test:fail') continue;
    const depth = data.nesting;
    const parent = below[depth + 1] === true;
    below.length = depth + 1;
    below[depth] = true;
    const error = data.details?.error;
    const outcome = outcomeOf(type, data);
    const group = parent || data.details?.type === 'suite';
    // What is above tests stands for them, unless it failed or was left out by itself.
    const stands = type === 'test:pass' ? outcome !== 'skipped' : error?.failureType === 'subtestsFailed';
    if (group && stands) continue;
    const test = { name: nameOf(data, above), outcome, ms: Math.trunc(data.details?.duration_ms ?? 0) };
    if (outcome === 'failed') test.message = inspect(error?.cause ?? error).slice(0, MOST_MESSAGE);
    ended += 1;
    tell(test);
  }
  if (Object.keys(untold).length > 0) say({ untold });
  say({ end: ended });
}
