//! Every language, each as one entry. A new one is an entry here, its packages in
//! `runner-image/Dockerfile`, and its examples in `tests/languages/`.

use super::{Compile, Language, ReportFormat, TestRunner, Tool};

/// Node's own test runner.
const NODE_TEST: &[&str] = &[
    "node",
    "--test",
    "--test-reporter=spec",
    "--test-reporter-destination=stdout",
    "--test-reporter=junit",
    "--test-reporter-destination={report}",
];

const NODE: Tool = tool("node", "apt-get install nodejs");

/// Every language, in the order the page lists them.
pub static LANGUAGES: &[Language] = &[
    Language {
        aliases: &["python3", "py"],
        others: &["app.py"],
        project: Some("requirements.txt"),
        settings: &["python3"],
        test_runner: Some(TestRunner {
            name: "pytest",
            argv: &[
                "python3",
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "--junitxml={report}",
            ],
            file: "{file}",
            format: ReportFormat::JUnit,
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
        project: Some("package.json"),
        test_runner: Some(TestRunner {
            name: "node --test",
            argv: NODE_TEST,
            file: "{file}",
            format: ReportFormat::JUnit,
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
        test_runner: Some(TestRunner {
            name: "node --test",
            argv: NODE_TEST,
            file: ".build/{stem}.js",
            format: ReportFormat::JUnit,
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
                    "cargo build --release --offline --quiet && cp -- \"$(find target/release \
                     -maxdepth 1 -type f -perm -u+x | head -n 1)\" .build/main",
                ]),
            },
        )
    },
    compiled(
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
    ),
    Language {
        aliases: &["c++"],
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
        compile: None,
        run,
        test_runner: None,
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
