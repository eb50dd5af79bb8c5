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
        others: &["app.py"],
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
        others: &["index.js", "server.js", "app.js"],
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
        others: &["index.ts", "src/main.ts", "src/index.ts"],
        install: Some(NPM),
        project: Some("tsconfig.json"),
        compile: Some(Compile {
            argv: &[
                "tsc",
                "--pretty",
                "false",
                "--outDir",
                ".build",
                "--rootDir",
                ".",
                "--target",
                "es2022",
                "--module",
                "node16",
                "--moduleResolution",
                "node16",
                "--esModuleInterop",
                "--skipLibCheck",
                "--strict",
                "--noEmitOnError",
                "--typeRoots",
                TYPES,
                "{sources}",
            ],
            project: Some(&[
                "tsc",
                "--pretty",
                "false",
                "--project",
                ".",
                "--outDir",
                ".build",
                "--rootDir",
                ".",
                "--noEmitOnError",
                "--typeRoots",
                TYPES,
            ]),
        }),
        tests: TestFiles::Runner(TestRunner {
            name: "node --test",
            argv: NODE_TEST,
            file: ".build/{stem}.js",
            install: "Node.js 20 or later",
        }),
        ..interpreted(
            "typescript",
            "main.ts",
            &["ts"],
            &[
                tool(
                    "tsc",
                    "apt-get install node-typescript, or npm install -g typescript @types/node",
                ),
                NODE,
            ],
            &["node", ".build/{stem}.js"],
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
            argv: &["go", "test", "-v", "-vet=off", "{file}", "{sources}"],
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
                argv: &["go", "build", "-o", ".build/main", "{sources}"],
                project: Some(&["go", "build", "-o", ".build/main", "."]),
            },
        )
    },
    Language {
        aliases: &["rs"],
        others: &["src/main.rs"],
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
            // The index is told as a setting, which the compiler has to find again.
            argv: &[
                "sh",
                "-c",
                "printf '[source.crates-io]\\nreplace-with = \"index\"\\n[source.index]\\nregistry = \"sparse+%s\"\\n' \
                 \"$1\" > \"$CARGO_HOME/config.toml\" && exec cargo fetch",
                "sh",
                "{index}",
            ],
            env: &[("CARGO_HOME", ".cargo-home")],
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
            // Cargo knows a test by its file's name.
            project: Some(&["cargo", "test", "--offline", "--quiet", "--test", "{class}"]),
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
                // A package's program has a name of its own.
                project: Some(&[
                    "sh",
                    "-c",
                    "export CARGO_TARGET_DIR=.cache/target && cargo build --release --offline --quiet && \
                     cp -- \"$(find $CARGO_TARGET_DIR/release -maxdepth 1 -type f -perm -u+x | head -n 1)\" \
                     .build/main",
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
                "cc -std=gnu17 -g -Wall -I . -o \"$TMPDIR/test\" \"$@\" -lm -pthread && exec \"$TMPDIR/test\"",
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
        tests: compiled_each(
            "assert",
            &[
                "sh",
                "-c",
                "c++ -std=c++20 -g -Wall -I . -o \"$TMPDIR/test\" \"$@\" -pthread && exec \"$TMPDIR/test\"",
                "sh",
                "{file}",
                "{sources}",
            ],
        ),
        ..compiled(
            "cpp",
            "main.cpp",
            &["cpp", "cc", "cxx"],
            &[tool("c++", "apt-get install g++")],
            Compile {
                argv: &[
                    "c++",
                    "-std=c++20",
                    "-O2",
                    "-Wall",
                    "-I",
                    ".",
                    "-o",
                    ".build/main",
                    "{sources}",
                    "-pthread",
                ],
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
                 -XX:TieredStopAtLevel=1 -cp \"$TMPDIR/test\" \"$class\"",
                "sh",
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
                "-cp",
                ".build",
                "{class}",
            ],
        )
    },
    Language {
        project: Some("Gemfile"),
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
        settings: &["php"],
        tests: each(
            "php with assertions",
            &[
                "php",
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
            &["php", "{file}"],
        )
    },
    Language {
        project: Some("cpanfile"),
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
    let mut language = interpreted(name, entrypoint, extensions, tools, &[".build/main"]);
    language.compile = Some(compile);
    language
}

/// Test files that are run one by one as they are.
const fn each(name: &'static str, argv: &'static [&'static str]) -> TestFiles {
    TestFiles::Each(TestCommand {
        name,
        argv,
        project: None,
        has_own_entry: false,
        compiles: false,
        proof: Proof::None,
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
