//! Every language, each as one entry. A new one is an entry here, its packages in
//! `runner-image/Dockerfile`, and its examples in `tests/languages/`.

use super::{Compile, Language, Proof, TestCommand, TestFiles, TestRunner, Tool};
use crate::model::{Install, Naming, Registry};

/// Node's own test runner.
const NODE_TEST: &[&str] = &[
    "node",
    "--test",
    "--test-reporter=spec",
    "--test-reporter-destination=stdout",
    "--test-reporter={reporters}/report_node.mjs",
    "--test-reporter-destination=/dev/null",
];

/// npm, into the folder where Node looks.
const NPM: Install = Install {
    name: "npm",
    install: "apt-get install npm",
    registry: &Registry {
        variable: "npm_config_registry",
        usual: "https://registry.npmjs.org/",
        beside: &[],
    },
    file: "package.json",
    naming: Naming::Members(&["dependencies", "devDependencies", "optionalDependencies"]),
    beside: &["package-lock.json", "npm-shrinkwrap.json", ".npmrc"],
    elsewhere: &[
        "file:",
        "link:",
        "\"workspaces\"",
        "\"scripts\"",
        "\"./",
        "\"../",
    ],
    argv: &[
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--no-update-notifier",
        "--no-progress",
        "--maxsockets=4",
        "--fetch-retries=1",
        "--fetch-retry-mintimeout=1000",
    ],
    env: &[("npm_config_registry", "{index}")],
    plain_env: &[],
    folders: &["node_modules"],
    own: &["node_modules"],
    needed_to_run: true,
    compile_env: &[],
};

const NODE: Tool = tool("node", "apt-get install nodejs");

/// Every language, in the order the page lists them.
pub static LANGUAGES: &[Language] = &[
    Language {
        aliases: &["python3", "py"],
        others: &["app.py", "server.py", "__main__.py", "src/main.py"],
        project: Some("requirements.txt"),
        settings: &["python3"],
        // Where Python looks by itself: the user's own packages, below the home, which is the workspace.
        install: Some(Install {
            name: "pip",
            install: "apt-get install python3-pip",
            registry: &Registry {
                variable: "PIP_INDEX_URL",
                usual: "https://pypi.org/simple",
                beside: &["files.pythonhosted.org"],
            },
            file: "requirements.txt",
            naming: Naming::Lines,
            beside: &[],
            elsewhere: &["\n-", "\n.", "\n/", "file:"],
            argv: &[
                "python3",
                "-m",
                "pip",
                "install",
                "--user",
                "--no-input",
                "--no-cache-dir",
                "--disable-pip-version-check",
                "--no-warn-script-location",
                "--progress-bar=off",
                "--retries=1",
                "--requirement=requirements.txt",
            ],
            // Debian keeps pip out of its own packages' folder, which this is not.
            env: &[
                ("PIP_INDEX_URL", "{index}"),
                ("PIP_BREAK_SYSTEM_PACKAGES", "1"),
            ],
            plain_env: &[("PIP_TRUSTED_HOST", "{hosts}")],
            folders: &[".local"],
            own: &[".local/lib", ".local/bin"],
            needed_to_run: true,
            compile_env: &[],
        }),
        tests: TestFiles::Runner(TestRunner {
            name: "pytest",
            argv: &[
                "python3",
                "{reporters}/report_python.py",
                "-q",
                "-p",
                "no:cacheprovider",
            ],
            file: "{file}",
            install: "pip install pytest",
        }),
        warm: true,
        ..interpreted(
            "python",
            "main.py",
            &["py"],
            &[tool("python3", "apt-get install python3")],
            &["python3", "{file}"],
        )
    },
    Language {
        aliases: &["nodejs", "javascript", "js"],
        others: &[
            "main.mjs",
            "main.cjs",
            "index.js",
            "index.mjs",
            "index.cjs",
            "server.js",
            "server.mjs",
            "app.js",
            "app.mjs",
            "src/index.js",
            "src/main.js",
        ],
        install: Some(NPM),
        project: Some("package.json"),
        tests: TestFiles::Runner(TestRunner {
            name: "node --test",
            argv: NODE_TEST,
            file: "{file}",
            install: "Node.js 20 or later",
        }),
        ..interpreted(
            "node",
            "main.js",
            &["js", "mjs", "cjs"],
            &[NODE],
            &["node", "{file}"],
        )
    },
    Language {
        aliases: &["ts"],
        others: &[
            "main.mts",
            "main.cts",
            "index.ts",
            "index.mts",
            "src/main.ts",
            "src/index.ts",
            "src/index.mts",
            "server.ts",
            "app.ts",
            "src/server.ts",
            "src/app.ts",
        ],
        install: Some(NPM),
        project: Some("tsconfig.json"),
        compile: Some(Compile {
            argv: &[
                "sh",
                "-c",
                "types=$1 finish=$2; shift 2; \
                 case $(tsc --version) in *' '[1-5].*) ;; *) set -- --types '*' \"$@\";; esac; \
                 tsc --pretty false --outDir .build --rootDir . --target es2022 --module node16 \
                 --moduleResolution node16 --esModuleInterop --skipLibCheck --strict --noEmitOnError \
                 --sourceMap --typeRoots \"$types\" \"$@\" && exec node -e \"$finish\" </dev/null",
                "sh",
                TYPES,
                FINISH_TYPESCRIPT,
                "{sources}",
            ],
            // A project that leaves it to another program to make scripts is checked as it says, and made here.
            // Since version 6 types are not found unless they are asked for.
            project: Some(&[
                "sh",
                "-c",
                "types=$1 finish=$2; set --; set=$(tsc --project . --showConfig); \
                 case $set in *'\"allowImportingTsExtensions\": true'*) set -- --rewriteRelativeImportExtensions;; esac; \
                 case $(tsc --version)$set in *' '[1-5].*|*'\"types\":'*) ;; *) set -- \"$@\" --types '*';; esac; \
                 tsc --pretty false --project . --outDir .build --rootDir . --noEmit false \
                 --emitDeclarationOnly false --noEmitOnError --sourceMap true --inlineSourceMap false \
                 --typeRoots \"$types\" \"$@\" && printf %s \"$set\" | node -e \"$finish\"",
                "sh",
                TYPES,
                FINISH_TYPESCRIPT,
            ]),
        }),
        tests: TestFiles::Runner(TestRunner {
            name: "node --test",
            argv: NODE_TEST,
            file: ".build/{script}",
            install: "Node.js 20 or later",
        }),
        ..interpreted(
            "typescript",
            "main.ts",
            &["ts", "mts", "cts"],
            &[
                tool(
                    "tsc",
                    "apt-get install node-typescript, or npm install -g typescript@5 @types/node@20",
                ),
                NODE,
            ],
            // What fails is shown with its own lines.
            &["node", "--enable-source-maps", ".build/{script}"],
        )
    },
    interpreted(
        "bash",
        "main.sh",
        &["sh", "bash"],
        &[tool("bash", "apt-get install bash")],
        &["bash", "{file}"],
    ),
    Language {
        aliases: &["golang"],
        project: Some("go.mod"),
        install: Some(Install {
            name: "go",
            install: "apt-get install golang-go",
            registry: &Registry {
                variable: "GOPROXY",
                usual: "https://proxy.golang.org",
                beside: &[],
            },
            file: "go.mod",
            naming: Naming::Word("require"),
            beside: &["go.sum", "go.work"],
            elsewhere: &["=> ."],
            argv: &["go", "mod", "download"],
            // Sums are those of go.sum, where it has them, and the index's otherwise.
            env: &[
                ("GOPROXY", "{index}"),
                ("GOSUMDB", "off"),
                ("GOFLAGS", "-mod=mod -modcacherw"),
            ],
            plain_env: &[("GOINSECURE", "*")],
            folders: &["go"],
            own: &["go/pkg/mod"],
            needed_to_run: false,
            compile_env: &[
                ("GOPROXY", "off"),
                ("GOSUMDB", "off"),
                ("GOFLAGS", "-buildvcs=false -mod=mod"),
            ],
        }),
        tests: TestFiles::Each(TestCommand {
            name: "go test",
            argv: &["go", "test", "-v", "-vet=off", "{file}", "{beside}"],
            project: Some(&["go", "test", "-v", "-vet=off", "./{folder}"]),
            has_own_entry: false,
            compiles: true,
            proof: Proof::Go,
        }),
        // Nothing of a compiler's is looked for or told elsewhere.
        env: &[
            ("GOTOOLCHAIN", "local"),
            ("GOTELEMETRY", "off"),
            ("GOFLAGS", "-buildvcs=false"),
        ],
        ..compiled(
            "go",
            "main.go",
            &["go"],
            &[tool("go", "apt-get install golang-go")],
            Compile {
                // Without a module its folder is built as one: what is for other systems is left out.
                argv: &[
                    "env",
                    "GO111MODULE=off",
                    "go",
                    "build",
                    "-o",
                    ".build/main",
                    "./{folder}",
                ],
                project: Some(&["go", "build", "-o", ".build/main", "./{folder}"]),
            },
        )
    },
    Language {
        aliases: &["rs"],
        others: &["src/main.rs"],
        // A build is not repeated, and errors need lines only: half the space.
        env: &[("CARGO_INCREMENTAL", "0"), ("CARGO_PROFILE_DEV_DEBUG", "1")],
        project: Some("Cargo.toml"),
        install: Some(Install {
            name: "cargo",
            install: "apt-get install cargo, 1.70 or newer",
            registry: &Registry {
                variable: "GANTRY_CARGO_INDEX",
                usual: "https://index.crates.io/",
                beside: &["static.crates.io"],
            },
            file: "Cargo.toml",
            naming: Naming::Headings(&["dependencies", "dev-dependencies", "build-dependencies"]),
            beside: &["Cargo.lock", ".cargo/config.toml"],
            elsewhere: &["path =", "path=", "[workspace", "build ="],
            // Another index than Cargo's own is told as a setting, which the compiler has to find again.
            argv: &[
                "sh",
                "-c",
                "rm -f \"$CARGO_HOME/config.toml\"; [ \"${1%/}\" = https://index.crates.io ] || printf '[source.crates-io]\\nreplace-with = \"index\"\\n[source.index]\\nregistry = \"sparse+%s\"\\n' \
                 \"$1\" > \"$CARGO_HOME/config.toml\"; \
                 exec cargo fetch --target \"$(rustc -vV | sed -n 's/^host: //p')\"",
                "sh",
                "{index}",
            ],
            env: &[("CARGO_HOME", ".cargo-home"), ("CARGO_NET_RETRY", "1")],
            plain_env: &[],
            folders: &[".cargo-home"],
            own: &[".cargo-home"],
            needed_to_run: false,
            compile_env: &[("CARGO_HOME", ".cargo-home")],
        }),
        tests: TestFiles::Each(TestCommand {
            name: "rustc --test",
            argv: &[
                "sh",
                "-c",
                "rustc --edition 2021 --test -o \"$TMPDIR/test\" \"$1\" && exec \"$TMPDIR/test\"",
                "sh",
                "{file}",
            ],
            project: Some(&["cargo", "test", "--offline", "--quiet", "{target}"]),
            has_own_entry: false,
            compiles: true,
            proof: Proof::Rust,
        }),
        ..compiled(
            "rust",
            "main.rs",
            &["rs"],
            &[
                Tool {
                    command: "rustc",
                    home: &["--print", "sysroot"],
                    install: "apt-get install rustc, or https://rustup.rs",
                },
                tool("cc", "apt-get install gcc libc6-dev"),
            ],
            Compile {
                argv: &[
                    "rustc",
                    "--edition",
                    "2021",
                    "-O",
                    "-o",
                    ".build/main",
                    "{file}",
                ],
                // Cargo knows which program the project declares; what it would run is copied.
                project: Some(&[
                    "sh",
                    "-c",
                    "export CARGO_TARGET_DIR=.cache/target && exec cargo run --release --offline --quiet \
                     --config \"target.'cfg(all())'.runner=['cp', '--']\" \"$@\" -- .build/main",
                    "sh",
                    "{target}",
                ]),
            },
        )
    },
    Language {
        tests: compiled_each(
            "assert",
            &[
                "sh",
                "-c",
                "cc -std=gnu17 -g -Wall -I . -I include -I src -o \"$TMPDIR/test\" \"$@\" -lm -pthread || exit; \
                 ulimit -S -s 262144 2>/dev/null; exec \"$TMPDIR/test\"",
                "sh",
                "{file}",
                "{sources}",
            ],
        ),
        ..compiled(
            "c",
            "main.c",
            &["c"],
            &[tool("cc", "apt-get install gcc libc6-dev")],
            Compile {
                argv: &[
                    "cc",
                    "-std=gnu17",
                    "-O2",
                    "-Wall",
                    "-I",
                    ".",
                    "-I",
                    "include",
                    "-I",
                    "src",
                    "-o",
                    ".build/main",
                    "{sources}",
                    "-lm",
                    "-pthread",
                ],
                project: None,
            },
        )
    },
    Language {
        aliases: &["c++"],
        others: &["main.cc", "main.cxx", "src/main.cpp", "src/main.cc"],
        with: &["c"],
        tests: compiled_each(
            "assert",
            &["sh", "-c", CPP, "sh", "-g", "test", "{file}", "{sources}"],
        ),
        ..compiled(
            "cpp",
            "main.cpp",
            &["cpp", "cc", "cxx"],
            &[tool("c++", "apt-get install g++")],
            Compile {
                argv: &["sh", "-c", CPP, "sh", "-O2", "", "{sources}"],
                project: None,
            },
        )
    },
    Language {
        settings: &["java-"],
        tests: compiled_each(
            "java -ea",
            &[
                "sh",
                "-c",
                "class=$1 && shift && javac -J-Xmx256m -J-XX:+UseSerialGC -J-XX:TieredStopAtLevel=1 \
                 -encoding UTF-8 -d \"$TMPDIR/test\" \"$@\" && exec java -ea -Xmx256m -XX:+UseSerialGC \
                 -XX:TieredStopAtLevel=1 -cp \"$TMPDIR/test:$0\" \"$class\"",
                JAVA_RESOURCES,
                "{class}",
                "{file}",
                "{sources}",
            ],
        ),
        compile: Some(Compile {
            argv: &[
                "javac",
                "-J-Xmx256m",
                "-J-XX:+UseSerialGC",
                "-J-XX:TieredStopAtLevel=1",
                "-encoding",
                "UTF-8",
                "-d",
                ".build",
                "{sources}",
            ],
            project: None,
        }),
        ..interpreted(
            "java",
            "Main.java",
            &["java"],
            &[
                tool("javac", "apt-get install default-jdk-headless"),
                tool("java", "apt-get install default-jre-headless"),
            ],
            // Half of a run's memory for objects: the rest is the machine's own.
            &[
                "java",
                "-XX:+UseSerialGC",
                "-XX:TieredStopAtLevel=1",
                "-XX:MaxRAM={memory}",
                "-XX:MaxRAMPercentage=50",
                "-Xss{memory}",
                "-cp",
                JAVA_CLASSES,
                "{class}",
            ],
        )
    },
    Language {
        project: Some("Gemfile"),
        others: &["app.rb", "server.rb"],
        // Of minitest and test-unit.
        tests: proved_each(
            "ruby",
            &["ruby", "{file}"],
            Proof::Unless(&["0 runs, ", "0 tests, "]),
        ),
        ..interpreted(
            "ruby",
            "main.rb",
            &["rb"],
            &[tool("ruby", "apt-get install ruby")],
            &["ruby", "{file}"],
        )
    },
    Language {
        project: Some("composer.json"),
        others: &["index.php"],
        settings: &["php"],
        tests: each(
            "php with assertions",
            &[
                "php",
                PHP_SESSIONS[0],
                PHP_SESSIONS[1],
                "-d",
                "zend.assertions=1",
                "-d",
                "assert.exception=1",
                "{file}",
            ],
        ),
        ..interpreted(
            "php",
            "main.php",
            &["php"],
            &[tool("php", "apt-get install php-cli")],
            &["php", PHP_SESSIONS[0], PHP_SESSIONS[1], "{file}"],
        )
    },
    Language {
        project: Some("cpanfile"),
        others: &["app.pl"],
        settings: &["perl"],
        tests: each("prove", &["prove", "-v", "-I.", "{file}"]),
        ..interpreted(
            "perl",
            "main.pl",
            &["pl"],
            &[tool("perl", "apt-get install perl")],
            &["perl", "{file}"],
        )
    },
    interpreted(
        "lua",
        "main.lua",
        &["lua"],
        &[tool("lua", "apt-get install lua5.4")],
        &["lua", "{file}"],
    ),
];

/// Where packages with types are: Debian's, npm's own for all, and the project's. Those that are not
/// there are passed over.
const TYPES: &str = "node_modules/@types,/usr/share/nodejs/@types,/usr/lib/node_modules/@types,/usr/local/lib/node_modules/@types";

/// Runs a compiled program. Its stack may have all the memory that it has, and its memory is bounded anyway.
const RUN_COMPILED: &[&str] = &[
    "sh",
    "-c",
    "ulimit -S -s \"$1\" 2>/dev/null; shift; exec .build/main \"$@\"",
    "sh",
    "{stack}",
];

/// What `tsc` leaves undone, in the words of Node: files that programs look for beside their scripts are shown
/// there; imports that name no ending, as bundlers take them, get the ending of the file that is there; imports
/// by the project's `paths` and `baseUrl`, which come on its standard input, name the file; and scripts are taken
/// for modules where they are.
const FINISH_TYPESCRIPT: &str = r#"
const fs = require('fs'), path = require('path');
const is = at => { try { return fs.statSync(at).isFile() } catch { return false } };
const walk = (folder, each) => {
  for (const entry of fs.readdirSync(folder, { withFileTypes: true })) {
    const at = path.join(folder, entry.name);
    if (entry.isDirectory()) { if (!entry.name.startsWith('.') && entry.name !== 'node_modules') walk(at, each) }
    else if (entry.isFile()) each(at);
  }
};
const given = fs.readFileSync(0, 'utf8');
const { paths = {}, baseUrl } = given ? JSON.parse(given).compilerOptions ?? {} : {};
const ENDINGS = ['.js', '.mjs', '.cjs', '/index.js', '/index.mjs'];
// The script that is made of this file, which is named with or without its ending.
const script = at => {
  const made = path.resolve('.build', path.relative('.', at));
  const whole = made.replace(/\.([mc]?)tsx?$/, '.$1js');
  return is(whole) ? whole : ENDINGS.map(ending => made + ending).find(is) ?? (is(at) ? made : undefined);
};
const patterns = Object.entries(paths).sort(([a], [b]) => b.indexOf('*') - a.indexOf('*') || b.length - a.length);
const mapped = name => {
  const found = [];
  for (const [pattern, targets] of patterns) {
    const [before, after] = pattern.split('*');
    if (after === undefined ? name !== pattern : !(name.startsWith(before) && name.endsWith(after) && name.length >= pattern.length - 1)) continue;
    const middle = after === undefined ? '' : name.slice(before.length, name.length - after.length);
    found.push(...targets.map(target => target.replace('*', () => middle)));
    break;
  }
  if (baseUrl !== undefined) found.push(name);
  for (const target of found) {
    const to = script(path.resolve(baseUrl ?? '.', target));
    if (to) return to;
  }
};
let modules = false;
walk('.build', at => {
  if (!/\.[mc]?js$/.test(at)) return;
  const text = fs.readFileSync(at, 'utf8');
  const isModule = at.endsWith('.js') && !text.includes('Object.defineProperty(exports, "__esModule"') && /^(import\s*["'{*\w]|export\s)/m.test(text);
  modules ||= isModule;
  const named = text.replace(/(\bfrom\s*|\bimport\s*\(?\s*|\brequire\s*\(\s*)(["'])([^"'\n]+)\2/g, (all, before, quote, name) => {
    if (!/^\.{1,2}(\/|$)/.test(name)) {
      const to = mapped(name);
      if (!to) return all;
      const short = path.relative(path.dirname(path.resolve(at)), to);
      return before + quote + (short.startsWith('.') ? short : './' + short) + quote;
    }
    const to = path.resolve(path.dirname(at), name);
    if (!isModule || is(to)) return all;
    const ending = ENDINGS.find(ending => is(to + ending));
    return ending ? before + quote + name.replace(/\/$/, '') + ending + quote : all;
  });
  if (named !== text) fs.writeFileSync(at, named);
});
walk('.', at => {
  if (/\.[mc]?tsx?$/.test(at) || at === 'package.json') return;
  const to = path.join('.build', at);
  fs.mkdirSync(path.dirname(to), { recursive: true });
  try { fs.symlinkSync(path.relative(path.dirname(to), at), to) } catch (error) { if (error.code !== 'EEXIST') throw error }
});
let project = {};
try { project = JSON.parse(fs.readFileSync('package.json', 'utf8')) } catch {}
fs.writeFileSync('.build/package.json', JSON.stringify({ ...project, type: modules ? 'module' : 'commonjs' }));
"#;

/// Compiles C++, and by themselves the files that are C. Its first argument is how; its second says whether the
/// result is a test, which is run.
const CPP: &str = "how=$1 test=$2; shift 2; number=0; set -- \"$@\" --; \
     while [ \"$1\" != -- ]; do file=$1; shift; \
     case \"$file\" in *.c) number=$((number + 1)); object=\"${TMPDIR:-/tmp}/$number.o\"; \
     cc -std=gnu17 \"$how\" -Wall -I . -I include -I src -c -o \"$object\" \"$file\" || exit; file=$object;; esac; \
     set -- \"$@\" \"$file\"; done; shift; \
     to=.build/main; [ -z \"$test\" ] || to=$TMPDIR/test; \
     c++ -std=c++20 \"$how\" -Wall -I . -I include -I src -o \"$to\" \"$@\" -pthread || exit; \
     [ -n \"$test\" ] || exit 0; ulimit -S -s 262144 2>/dev/null; exec \"$to\"";

/// Where programs of Java find files: beside their sources, wherever the usual projects have those.
const JAVA_RESOURCES: &str = ".:src:src/main/java:src/main/resources:resources";

/// The same with what was compiled.
const JAVA_CLASSES: &str = ".build:.:src:src/main/java:src/main/resources:resources";

/// Sessions go to the folder of temporary files: the place that distributions set is not a program's.
const PHP_SESSIONS: [&str; 2] = ["-d", "session.save_path="];

const fn tool(command: &'static str, install: &'static str) -> Tool {
    Tool {
        command,
        home: &[],
        install,
    }
}

const fn interpreted(
    name: &'static str,
    entrypoint: &'static str,
    extensions: &'static [&'static str],
    tools: &'static [Tool],
    run: &'static [&'static str],
) -> Language {
    Language {
        name,
        aliases: &[],
        entrypoint,
        others: &[],
        extensions,
        with: &[],
        project: None,
        tools,
        settings: &[],
        env: &[],
        install: None,
        compile: None,
        run,
        // As a program of it runs.
        tests: each(name, run),
        warm: false,
    }
}

/// A language whose compiler makes a program that runs by itself.
const fn compiled(
    name: &'static str,
    entrypoint: &'static str,
    extensions: &'static [&'static str],
    tools: &'static [Tool],
    compile: Compile,
) -> Language {
    let mut language = interpreted(name, entrypoint, extensions, tools, RUN_COMPILED);
    language.compile = Some(compile);
    language
}

/// Test files that are run one by one as they are.
const fn each(name: &'static str, argv: &'static [&'static str]) -> TestFiles {
    proved_each(name, argv, Proof::None)
}

/// The same, where more than the exit code tells whether a test ran.
const fn proved_each(name: &'static str, argv: &'static [&'static str], proof: Proof) -> TestFiles {
    TestFiles::Each(TestCommand {
        name,
        argv,
        project: None,
        has_own_entry: false,
        compiles: false,
        proof,
    })
}

/// Test files that are compiled and run one by one, each with an entry of its own.
const fn compiled_each(name: &'static str, argv: &'static [&'static str]) -> TestFiles {
    TestFiles::Each(TestCommand {
        name,
        argv,
        project: None,
        has_own_entry: true,
        compiles: true,
        proof: Proof::None,
    })
}
