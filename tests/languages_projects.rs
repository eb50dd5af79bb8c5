//! Projects as people have them: which file is run, what it finds beside it, and what is a library only. Through
//! the real server, each by its language's own tools.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "figures, shown with --nocapture")]

#[allow(
    dead_code,
    reason = "shared with the tests of the protocol, which use all of it"
)]
#[path = "protocol/server.rs"]
mod server;

#[allow(dead_code, reason = "shared with the tests of the pipeline")]
#[path = "pipeline/client.rs"]
mod client;

use std::time::Instant;

use client::Client;
use serde_json::{Value, json};
use server::Server;

/// A project, and what comes of it.
struct Case {
    name: &'static str,
    message: Value,
    /// Of the reply: `status`, then words of what it says.
    expected: (&'static str, &'static [&'static str]),
}

fn passes(name: &'static str, message: Value, words: &'static [&'static str]) -> Case {
    Case {
        name,
        message,
        expected: ("tests_passed", words),
    }
}

fn ends(
    name: &'static str,
    status: &'static str,
    message: Value,
    words: &'static [&'static str],
) -> Case {
    Case {
        name,
        message,
        expected: (status, words),
    }
}

/// Sends each and compares; a language that this machine lacks is said to be.
async fn run(cases: Vec<Case>) {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let mut wrong = Vec::new();
    for case in cases {
        let mut message = case.message;
        message["user_id"] = json!("projects");
        if message.get("deploy").is_none() {
            message["deploy"] = json!(false);
        }
        let begun = Instant::now();
        let reply = client.ask(message).await;
        println!("{}: {:?}", case.name, begun.elapsed());
        if reply["error"]["code"] == "language_unavailable" {
            assert!(std::env::var_os("CI").is_none(), "{}: {reply}", case.name);
            eprintln!("SKIPPED, NOT TESTED: {}", case.name);
            continue;
        }
        let (status, words) = case.expected;
        let text = reply.to_string();
        let told = words.iter().all(|word| text.contains(word));
        if reply["status"] != status || !told {
            wrong.push(format!("{}: {reply}", case.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn project(language: &str, files: Value) -> Value {
    json!({ "language": language, "files": files })
}

fn with(mut message: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        message[name] = value.clone();
    }
    message
}

#[tokio::test]
async fn node_starts_what_npm_would() {
    let start = |script: &str, before: &str| {
        json!({ "main": "lib/app", "scripts": { "prestart": before, "start": script } }).to_string()
    };
    let say = "console.log('said', require('path').basename(__filename), process.env.MODE, process.argv.slice(2).join())";
    let files = |package: String| json!({ "package.json": package, "lib/app.js": say, "server.js": say, "make.js": "require('fs').writeFileSync('made', 'x')", "late.js": "console.log('made', require('fs').readFileSync('made', 'utf8'))" });
    let of = |package: String| project("node", files(package));
    run(vec![
        passes(
            "node .",
            of(start("node .", "")),
            &["said app.js undefined"],
        ),
        passes(
            "variables, flags, arguments",
            with(
                of(start("MODE=fast node --no-warnings server.js one", "")),
                json!({ "args": ["two"] }),
            ),
            &["said server.js fast one,two"],
        ),
        passes(
            "without an ending",
            of(start("node server", "")),
            &["said server.js undefined"],
        ),
        passes(
            "prestart",
            of(start("node late", "node make.js")),
            &["made x"],
        ),
        passes(
            "a shell's words",
            of(start("node server.js && echo done", "")),
            &["said server.js", "done"],
        ),
        passes(
            "the message's own entrypoint",
            with(
                of(start("node server.js", "")),
                json!({ "entrypoint": "lib/app.js" }),
            ),
            &["said app.js"],
        ),
        passes(
            "main.mjs",
            project(
                "node",
                json!({ "main.mjs": "import { a } from './a.mjs'; console.log(a)", "a.mjs": "export const a = 'module'" }),
            ),
            &["module"],
        ),
        passes(
            "the one that nobody imports",
            project(
                "node",
                json!({ "shop.js": "console.log(require('./cart'))", "cart.js": "module.exports = 'cart'", "notes.txt": "" }),
            ),
            &["cart"],
        ),
        ends(
            "two that can be meant",
            "invalid",
            project("node", json!({ "a.js": "1", "b.js": "2" })),
            &["a.js, b.js"],
        ),
    ])
    .await;
}

#[tokio::test]
async fn typescript_is_built_as_its_project_says() {
    let bundler = r#"{"compilerOptions":{"target":"ESNext","module":"ESNext","moduleResolution":"bundler","noEmit":true,"strict":true,"skipLibCheck":true}}"#;
    let endings = bundler.replace(
        "\"noEmit\"",
        "\"allowImportingTsExtensions\":true,\"noEmit\"",
    );
    let data = "import * as fs from 'fs';\nimport * as path from 'path';\nconsole.log(fs.readFileSync(path.join(__dirname, 'data.txt'), 'utf8'));\n";
    run(vec![
        passes(
            "data beside the source",
            project("typescript", json!({ "src/main.ts": data, "src/data.txt": "beside" })),
            &["beside"],
        ),
        passes(
            "main.mts",
            project("typescript", json!({ "main.mts": "import { a } from './a.mjs';\nconsole.log(await a());\n", "a.mts": "export const a = async (): Promise<string> => 'awaited';\n" })),
            &["awaited"],
        ),
        passes(
            "noEmit, ESNext and a bundler's imports",
            project("typescript", json!({
                "tsconfig.json": bundler,
                "package.json": r#"{"type":"module"}"#,
                "src/index.ts": "import { readFileSync } from 'fs';\nimport { word } from './lib/word';\nimport { all } from './lib';\nconst text = readFileSync(new URL('./data.txt', import.meta.url), 'utf8');\nconsole.log(word, all, await Promise.resolve(text));\n",
                "src/lib/word.ts": "export const word: string = 'bundled';\n",
                "src/lib/index.ts": "export * from './word';\nexport const all = 1;\n",
                "src/data.txt": "here",
            })),
            &["bundled 1 here"],
        ),
        passes(
            "imports of .ts",
            project("typescript", json!({
                "tsconfig.json": endings,
                "main.ts": "import { word } from './word.ts';\nconsole.log(word);\n",
                "word.ts": "export const word = 'ending';\n",
            })),
            &["ending"],
        ),
        passes(
            "paths of its project, as a script of Node's",
            project("typescript", json!({
                "tsconfig.json": r#"{"compilerOptions":{"target":"es2022","module":"commonjs","moduleResolution":"node10","ignoreDeprecations":"5.0","paths":{"@/*":["./src/*"],"words":["./src/lib/word.ts"]},"strict":true}}"#,
                "src/index.ts": "import { word } from '@/lib/word';\nimport { word as same } from 'words';\nconsole.log(word, same, require('@/data.json').n);\n",
                "src/lib/word.ts": "export const word: string = 'mapped';\n",
                "src/data.json": "{\"n\": 7}",
            })),
            &["mapped mapped 7"],
        ),
        passes(
            "paths of its project, as a module",
            project("typescript", json!({
                "tsconfig.json": bundler.replace("\"noEmit\"", "\"paths\":{\"@/*\":[\"./src/*\"]},\"noEmit\""),
                "package.json": r#"{"type":"module"}"#,
                "src/index.ts": "import { all } from '@/lib';\nconst { word } = await import('@/lib/word');\nconsole.log(all, word);\n",
                "src/lib/word.ts": "export const word: string = 'found';\n",
                "src/lib/index.ts": "export const all = 'all';\n",
            })),
            &["all found"],
        ),
        ends(
            "a trace",
            "tests_failed",
            project("typescript", json!({ "main.ts": "interface A { a: number }\n\nfunction fail(one: A): never {\n  throw new Error('at ' + one.a);\n}\nfail({ a: 1 });\n" })),
            &["main.ts:4"],
        ),
        passes(
            "what its package starts",
            project("typescript", json!({
                "package.json": r#"{"scripts":{"build":"tsc","start":"node dist/server.js"}}"#,
                "src/server.ts": "console.log('served');\n", "src/other.ts": "console.log('other');\n",
            })),
            &["served"],
        ),
    ])
    .await;
}

#[tokio::test]
async fn c_and_cpp_are_the_file_with_the_main_and_what_it_needs() {
    let deep = "#include <stdio.h>\nstatic long down(int n) { volatile char part[1024]; part[0] = (char)n; return n == 0 ? 0 : part[0] * 0 + 1 + down(n - 1); }\nint main(void) { printf(\"depth %ld\\n\", down(40000)); }\n";
    run(vec![
        passes(
            "include, src and a stray program",
            project("c", json!({
                "src/prog.c": "#include <stdio.h>\n#include \"sum.h\"\nint main(void) { printf(\"sum %d\\n\", sum(1, 2)); }",
                "src/sum.c": "#include <sum.h>\nint sum(int a, int b) { return a + b; }\n#ifdef TEST\nint main(void) { return 1; }\n#endif\n",
                "include/sum.h": "int sum(int a, int b);", "README.md": "int main() {}",
            })),
            &["sum 3"],
        ),
        passes(
            "another program beside main.c",
            project("c", json!({
                "main.c": "#include <stdio.h>\nint main(void) { puts(\"first\"); }",
                "old.c": "#include <stdio.h>\nint main(void) { puts(\"second\"); }",
            })),
            &["first"],
        ),
        ends(
            "two programs",
            "invalid",
            project("c", json!({ "a.c": "int main(void) { return 0; }", "b.c": "int main(void) { return 0; }" })),
            &["a.c, b.c"],
        ),
        passes("a deep stack", json!({ "language": "c", "code": deep }), &["depth 40000"]),
        passes(
            "main.cc with C beside it",
            project("cpp", json!({
                "main.cc": "#include <iostream>\nextern \"C\" { int twice(int); }\nint main() { std::cout << \"twice \" << twice(2) << '\\n'; }",
                "twice.c": "int twice(int class) { return 2 * class; }",
            })),
            &["twice 4"],
        ),
        Case {
            name: "a library with a test of it",
            message: with(
                project("c", json!({ "sum.c": "int sum(int a) { return a; }", "sum.h": "int sum(int);" })),
                json!({ "deploy": true, "tests": { "test_sum.c": "#include <assert.h>\n#include \"sum.h\"\nint main(void) { assert(sum(1) == 1); }" } }),
            ),
            expected: ("tests_passed", &["test_sum.c"]),
        },
    ])
    .await;
}

#[tokio::test]
async fn java_is_the_class_with_the_main() {
    run(vec![
        passes(
            "public class Hello",
            json!({ "language": "java", "code": "public class Hello {\n  public static void main(String[] args) { System.out.println(\"hello\"); }\n}" }),
            &["hello"],
        ),
        passes(
            "the only class with a main, and a file",
            project("java", json!({
                "src/shop/App.java": "package shop;\nimport java.nio.charset.StandardCharsets;\nclass Shelf {}\nclass Start {\n  public static void main(String[] args) throws Exception {\n    var beside = Start.class.getResourceAsStream(\"words.txt\").readAllBytes();\n    var top = Start.class.getResourceAsStream(\"/top.txt\").readAllBytes();\n    System.out.println(new String(beside, StandardCharsets.UTF_8) + new String(top, StandardCharsets.UTF_8));\n  }\n}",
                "src/shop/Cart.java": "package shop;\npublic class Cart {}",
                "src/shop/words.txt": "beside ", "src/main/resources/top.txt": "top",
            })),
            &["beside top"],
        ),
        passes(
            "a deep stack",
            json!({ "language": "java", "code": "class Main {\n  static int down(int n) { return n == 0 ? 0 : 1 + down(n - 1); }\n  public static void main(String[] args) { System.out.println(\"depth \" + down(200000)); }\n}" }),
            &["depth 200000"],
        ),
    ])
    .await;
}

#[tokio::test]
async fn cargo_and_go_run_the_program_that_is_meant() {
    let package = "[package]\nname = \"shop\"\nversion = \"1.0.0\"\nedition = \"2021\"\n";
    let says = |word: &str| format!("fn main() {{ println!(\"ran {word}\"); }}\n");
    let several = |manifest: &str| json!({ "Cargo.toml": manifest, "src/main.rs": says("main"), "src/bin/seed.rs": says("seed"), "src/bin/migrate.rs": says("migrate") });
    let default = package.replace("edition", "default-run = \"migrate\"\nedition");
    let go = |word: &str| {
        format!(
            "package main\n\nimport \"fmt\"\n\nfunc main() {{ fmt.Println(\"ran {word}\", helper()) }}\n"
        )
    };
    let helper = "package main\n\nfunc helper() string { return \"here\" }\n";
    let module = json!({ "go.mod": "module example.org/shop\n\ngo 1.19\n", "main.go": go("root"), "helper.go": helper, "cmd/app/main.go": go("app"), "cmd/app/helper.go": helper });
    run(vec![
        ends(
            "several binaries",
            "invalid",
            project("rust", several(package)),
            &["src/main.rs", "src/bin/seed.rs", "src/bin/migrate.rs"],
        ),
        passes(
            "the named binary",
            with(project("rust", several(package)), json!({ "entrypoint": "src/bin/seed.rs" })),
            &["ran seed"],
        ),
        passes("default-run", project("rust", several(&default)), &["ran migrate"]),
        Case {
            name: "unit tests in src/lib.rs, and no program",
            message: with(
                project("rust", json!({ "Cargo.toml": package, "src/lib.rs": "pub fn two() -> i32 { 2 }\n\n#[cfg(test)]\nmod tests {\n    #[test]\n    fn is_two() { assert_eq!(super::two(), 2); }\n}\n" })),
                json!({ "deploy": true, "tests": ["src/lib.rs"] }),
            ),
            expected: ("tests_passed", &["src/lib.rs"]),
        },
        Case {
            name: "a test of Cargo's with a main of its own",
            message: with(
                project("rust", json!({
                    "Cargo.toml": format!("{package}[[test]]\nname = \"own\"\nharness = false\n"),
                    "src/main.rs": says("main"), "tests/own.rs": "fn main() { println!(\"checked\"); }\n",
                })),
                json!({ "tests": ["tests/own.rs"] }),
            ),
            expected: ("tests_passed", &["tests/own.rs"]),
        },
        ends(
            "two programs of a module",
            "invalid",
            project("go", module.clone()),
            &["main.go", "cmd/app/main.go"],
        ),
        passes(
            "the named program of a module",
            with(project("go", module), json!({ "entrypoint": "cmd/app/main.go" })),
            &["ran app here"],
        ),
        passes(
            "files for other systems",
            project("go", json!({ "main.go": go("one"), "helper.go": helper, "helper_windows.go": helper })),
            &["ran one here"],
        ),
    ])
    .await;
}

#[tokio::test]
async fn scripts_are_run_from_the_one_that_is_meant() {
    run(vec![
        passes(
            "the one that nobody imports",
            project("python", json!({ "shop.py": "from cart import WORD\nprint(WORD)\n", "cart.py": "WORD = 'cart'\n", "notes.md": "import cart" })),
            &["cart"],
        ),
        passes(
            "relative imports in a package",
            with(
                project("python", json!({ "app/__init__.py": "", "app/main.py": "from .words import WORD\nprint(WORD)\n", "app/words.py": "WORD = 'relative'\n" })),
                json!({ "entrypoint": "app/main.py" }),
            ),
            &["relative"],
        ),
        Case {
            name: "a library with tests",
            message: with(
                project("python", json!({ "calc.py": "def add(a, b):\n    return a + b\n" })),
                json!({ "deploy": true, "tests": { "test_calc.py": "from calc import add\n\ndef test_add():\n    assert add(1, 2) == 3\n" } }),
            ),
            expected: ("tests_passed", &["test_add"]),
        },
        passes(
            "a script beside it can be run",
            project("bash", json!({ "main.sh": "./tool.py", "tool.py": "#!/usr/bin/env python3\nprint('tool')\n" })),
            &["tool"],
        ),
        passes(
            "fonts, where there are any",
            json!({ "language": "bash", "code": "if ! command -v fc-match >/dev/null || [ -z \"$(ls /usr/share/fonts 2>/dev/null)\" ]; then echo font; else fc-match -f 'font %{file}\n' sans; fi" }),
            &["font"],
        ),
        passes(
            "sessions of PHP",
            json!({ "language": "php", "code": "<?php\nini_set('session.use_cookies', '0');\nvar_dump(session_start());\n$_SESSION['a'] = 1;\nvar_dump(session_write_close());\n" }),
            &["bool(true)\\nbool(true)"],
        ),
    ])
    .await;
}
