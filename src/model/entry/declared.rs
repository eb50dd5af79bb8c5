//! What a `package.json` declares to be run, as npm and Node take it.

use serde_json::Value;

use super::{Files, text};
use crate::model::{Language, RelativePath};

/// Node's project file.
pub const PACKAGE: &str = "package.json";

/// The command by which a project starts itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Command; its arguments follow.
    pub argv: Vec<String>,
}

/// The file that the project declares to be its program, if it is one of the files.
pub fn entrypoint(language: &Language, files: &Files) -> Option<RelativePath> {
    let package: Value = serde_json::from_str(text(files, PACKAGE)?).ok()?;
    let script = script(&package, "start");
    match language.name {
        "node" => {
            let started = script.and_then(simple);
            let started = started.and_then(|simple| resolved(files, &package, &simple.file));
            match script {
                Some(_) => started,
                None => resolved(files, &package, package["main"].as_str()?),
            }
        }
        "typescript" => {
            let words = script.into_iter().flat_map(str::split_whitespace);
            let main = package["main"].as_str();
            let mut paths = words.filter(|word| word.contains(['.', '/'])).chain(main);
            paths.find_map(|path| source_of(files, path))
        }
        _ => None,
    }
}

/// How the project starts itself; `None`: its program is started as the language's are. `entrypoint`: the file
/// that was chosen, which may be another than the project's own.
pub fn start(
    language: &Language,
    files: &Files,
    entrypoint: Option<&RelativePath>,
) -> Option<Start> {
    if language.name != "node" {
        return None;
    }
    let package: Value = serde_json::from_str(text(files, PACKAGE)?).ok()?;
    let script = script(&package, "start")?;
    let simple = simple(script).and_then(|simple| {
        let file = resolved(files, &package, &simple.file)?;
        Some((simple, file))
    });
    let own = simple.as_ref().map(|(_, file)| file);
    if entrypoint != own {
        return None;
    }
    let before = self::script(&package, "prestart");
    let argv = match (simple, before) {
        (Some((simple, _)), None) => simple.argv,
        (_, before) => {
            let before = before.map_or(String::new(), |before| format!("{{ {before}\n}} && "));
            let command = format!(
                "PATH=\"$PWD/node_modules/.bin:$PATH\"; export PATH; {before}{script} \"$@\""
            );
            ["sh", "-c", &command, "sh"].map(str::to_owned).to_vec()
        }
    };
    Some(Start { argv })
}

fn script<'a>(package: &'a Value, name: &str) -> Option<&'a str> {
    let script = package["scripts"][name].as_str()?.trim();
    (!script.is_empty()).then_some(script)
}

/// A start script that only runs a file by Node.
struct Simple {
    argv: Vec<String>,
    file: String,
}

/// Flags of Node whose value is the next word.
const WITH_VALUE: [&str; 8] = [
    "-r",
    "--require",
    "--import",
    "--loader",
    "--experimental-loader",
    "-C",
    "--conditions",
    "--title",
];

fn simple(script: &str) -> Option<Simple> {
    // Anything else a shell has to read.
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,@+% ".contains(c);
    if !script.chars().all(plain) {
        return None;
    }
    let mut words = script.split_whitespace().peekable();
    let mut argv = Vec::new();
    while let Some(word) = words.next_if(|word| is_variable(word) || *word == "cross-env") {
        if is_variable(word) {
            argv.push(word.to_owned());
        }
    }
    if !argv.is_empty() {
        argv.insert(0, "env".to_owned());
    }
    argv.push(words.next_if_eq(&"node")?.to_owned());
    while let Some(flag) = words.next_if(|word| word.starts_with('-')) {
        // Code in place of a file.
        if matches!(
            flag,
            "-" | "-e" | "--eval" | "-p" | "--print" | "--test" | "--run"
        ) {
            return None;
        }
        argv.push(flag.to_owned());
        if WITH_VALUE.contains(&flag) {
            argv.push(words.next()?.to_owned());
        }
    }
    let file = words.next()?.to_owned();
    argv.push(file.clone());
    argv.extend(words.map(str::to_owned));
    Some(Simple { argv, file })
}

fn is_variable(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
    })
}

/// The file that Node runs for this name.
fn resolved(files: &Files, package: &Value, name: &str) -> Option<RelativePath> {
    let plain = |name: &str| {
        let name = name.trim_start_matches("./").trim_end_matches('/');
        (if name == "." { "" } else { name }).to_owned()
    };
    let mut name = plain(name);
    if name.is_empty() {
        name = plain(package["main"].as_str().unwrap_or("index"));
    }
    let endings = [
        "",
        ".js",
        ".mjs",
        ".cjs",
        "/index.js",
        "/index.mjs",
        "/index.cjs",
    ];
    let found = endings.iter().find_map(|ending| {
        let path = RelativePath::try_from(format!("{name}{ending}")).ok()?;
        files.contains_key(&path).then_some(path)
    });
    found.or_else(|| {
        let path = RelativePath::try_from("index.js".to_owned()).ok()?;
        let main = package["main"].is_string() && name == plain(package["main"].as_str()?);
        (main && files.contains_key(&path)).then_some(path)
    })
}

/// The source of which a project's own build makes this file, or which is named itself.
fn source_of(files: &Files, name: &str) -> Option<RelativePath> {
    let name = name.trim_start_matches("./").trim_end_matches('/');
    let file = name.rsplit('/').next().unwrap_or(name);
    let stem = match file.rsplit_once('.') {
        Some((_, ending)) if ["js", "mjs", "cjs", "ts", "mts", "cts"].contains(&ending) => {
            &name[..name.len() - ending.len() - 1]
        }
        _ => name,
    };
    let below = stem.split_once('/').map_or(stem, |(_, rest)| rest);
    let stems = [stem.to_owned(), format!("src/{below}"), below.to_owned()];
    stems.iter().find_map(|stem| {
        [".ts", ".mts", ".cts", "/index.ts"]
            .iter()
            .find_map(|ending| {
                let path = RelativePath::try_from(format!("{stem}{ending}")).ok()?;
                files.contains_key(&path).then_some(path)
            })
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::tests::files;
    use super::*;

    fn of(package: &str, more: &[&str]) -> (Option<String>, Option<Vec<String>>) {
        let mut all: Vec<(&str, &str)> = more.iter().map(|path| (*path, "")).collect();
        all.push((PACKAGE, package));
        let (node, files) = (Language::named("node").unwrap(), files(&all));
        let file = entrypoint(node, &files);
        let start = start(node, &files, file.as_ref());
        (file.map(String::from), start.map(|start| start.argv))
    }

    fn started(script: &str, more: &[&str]) -> (Option<String>, Option<Vec<String>>) {
        let package = serde_json::json!({ "main": "lib/app", "scripts": { "start": script } });
        of(&package.to_string(), more)
    }

    #[test]
    fn a_start_script_is_what_npm_would_run() {
        let there = ["lib/app.js", "server.js", "src/index.js"];
        for (script, file, argv) in [
            ("node .", "lib/app.js", "node ."),
            ("node server", "server.js", "node server"),
            ("node ./src/", "src/index.js", "node ./src/"),
            (
                "NODE_ENV=production node --no-warnings -r ./lib/app.js server.js --port 3000",
                "server.js",
                "env NODE_ENV=production node --no-warnings -r ./lib/app.js server.js --port 3000",
            ),
            (
                "cross-env A=1 node server.js",
                "server.js",
                "env A=1 node server.js",
            ),
        ] {
            let (found, command) = started(script, &there);
            assert_eq!(found.as_deref(), Some(file), "{script}");
            assert_eq!(command.unwrap().join(" "), argv, "{script}");
        }
        for script in [
            "node dist/server.js",
            "next start",
            "node server.js | cat",
            "node -e 1",
        ] {
            let (file, command) = started(script, &there);
            assert_eq!(file, None, "{script}");
            let command = command.unwrap();
            assert!(
                command[2].ends_with(&format!("{script} \"$@\"")),
                "{command:?}"
            );
        }
    }

    #[test]
    fn what_comes_before_the_start_is_run_before_it() {
        let package = r#"{"scripts":{"prestart":"node make.js","start":"node server.js"}}"#;
        let (file, argv) = of(package, &["server.js", "make.js"]);
        assert_eq!(file.as_deref(), Some("server.js"));
        assert!(argv.unwrap()[2].ends_with("{ node make.js\n} && node server.js \"$@\""));
    }

    #[test]
    fn without_a_script_the_main_file_is_run() {
        assert_eq!(
            of(r#"{"main":"a"}"#, &["a.js"]),
            (Some("a.js".to_owned()), None)
        );
        assert_eq!(of("{}", &["index.js"]), (None, None));
        assert_eq!(of(r#"{"main":"gone.js"}"#, &["other.js"]), (None, None));
    }

    #[test]
    fn typescripts_program_is_the_source_of_what_is_started() {
        let typescript = Language::named("typescript").unwrap();
        for (script, source) in [
            ("node dist/server.js", "src/server.ts"),
            ("tsx watch src/app.mts", "src/app.mts"),
        ] {
            let package = serde_json::json!({ "scripts": { "start": script } }).to_string();
            let files = files(&[(PACKAGE, &package), (source, ""), ("src/other.ts", "")]);
            let found = entrypoint(typescript, &files).map(String::from);
            assert_eq!(found.as_deref(), Some(source), "{script}");
        }
    }
}
