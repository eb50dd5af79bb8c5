// What the person is writing: code per language and the options of the next run, kept over visits.
import { batch, signal, computed, effect } from "./vendor/preact.js";
import { remembered } from "./storage.js";

/** Writing to storage on each key press would be felt with long code. */
const SAVE_DELAY_MS = 400;

export const SAMPLES = {
  python: "print('Hello')\n",
  node: "console.log('Hello');\n",
  nodejs: "console.log('Hello');\n",
  javascript: "console.log('Hello');\n",
  typescript: "const greeting: string = 'Hello';\nconsole.log(greeting);\n",
  bash: "echo Hello\n",
  go: 'package main\n\nimport "fmt"\n\nfunc main() {\n\tfmt.Println("Hello")\n}\n',
  rust: 'fn main() {\n    println!("Hello");\n}\n',
  c: '#include <stdio.h>\n\nint main(void) {\n    puts("Hello");\n    return 0;\n}\n',
  cpp: '#include <iostream>\n\nint main() {\n    std::cout << "Hello\\n";\n}\n',
  java: 'class Main {\n    public static void main(String[] args) {\n        System.out.println("Hello");\n    }\n}\n',
  ruby: "puts 'Hello'\n",
  php: '<?php\necho "Hello\\n";\n',
  perl: 'use strict;\nuse warnings;\n\nprint "Hello\\n";\n',
  lua: "print('Hello')\n",
};

const stored = remembered.read("draft") ?? {};
const NO_OPTIONS = { replId: "", deploy: true, stdin: "", interactive: false, cases: [] };

export const language = signal(stored.language ?? "python");
export const codeByLanguage = signal(stored.code ?? {});
export const options = signal({ ...NO_OPTIONS, ...stored.options });

export const code = computed(() => codeByLanguage.value[language.value] ?? SAMPLES[language.value] ?? "");

export function setCode(text, of = language.peek()) {
  codeByLanguage.value = { ...codeByLanguage.peek(), [of]: text };
}

export function setOption(name, value) {
  options.value = { ...options.peek(), [name]: value };
}

let timer = null;
/** Nothing was changed since the page came, or since the last person signed out: there is nothing to keep. */
let unchanged = true;
const save = () => {
  if (!unchanged) remembered.write("draft", { language: language.peek(), code: codeByLanguage.peek(), options: options.peek() });
};
let begun = false;
effect(() => {
  language.value, codeByLanguage.value, options.value;
  clearTimeout(timer);
  if (begun) {
    unchanged = false;
    timer = setTimeout(save, SAVE_DELAY_MS);
  }
  begun = true;
});
addEventListener("pagehide", save);

/** Forgets it here. What the browser keeps is the session's business. */
export function forgetDraft() {
  batch(() => {
    codeByLanguage.value = {};
    options.value = NO_OPTIONS;
  });
  clearTimeout(timer);
  unchanged = true;
}

/** Splits arguments as a shell would: spaces separate, single and double quotes and backslashes keep together. */
export function splitArguments(text) {
  const found = text.match(/(?:[^\s"'\\]+|\\.|"(?:[^"\\]|\\.)*"?|'[^']*'?)+/gs) ?? [];
  return found.map((word) =>
    word.replace(/\\(.)|"((?:[^"\\]|\\.)*)"?|'([^']*)'?/gs, (_, escaped, double, single) =>
      escaped ?? (double !== undefined ? double.replace(/\\(["\\])/g, "$1") : single),
    ),
  );
}

/** The fields of the submission frame, without the ids. */
export function submissionFields(userId) {
  const { replId, deploy, stdin, interactive, cases } = options.peek();
  const fields = { user_id: userId, language: language.peek(), code: code.peek(), deploy };
  if (replId.trim()) fields.repl_id = replId.trim();
  // Whose input is a text, or that of test cases, has no more to come.
  if (interactive && !cases.length) fields.interactive = true;
  else if (stdin) fields.stdin = stdin;
  const tests = cases.map((one, i) => ({
    name: one.name.trim() || `case ${i + 1}`,
    ...(one.stdin ? { stdin: one.stdin } : {}),
    ...(one.args.trim() ? { args: splitArguments(one.args) } : {}),
    expected_stdout: one.expected,
  }));
  if (tests.length) fields.tests = tests;
  return fields;
}
