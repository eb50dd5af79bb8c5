//! A submission's message: from files on disk to one JSON text.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::collect::{self, Folder};
use super::failure::Failure;
use super::render;
use super::submit::SubmitArgs;
use crate::model::{Case, LANGUAGES, Language, MAX_MESSAGE_BYTES, SubmissionId, UserId};

/// A submission that is ready to be sent, as often as it takes: the server runs an id once.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) id: SubmissionId,
    pub(super) text: String,
}

/// What is to be run and tested.
#[derive(Debug)]
pub(super) struct Program {
    language: &'static Language,
    source: Source,
    tests: Option<Value>,
    stdin: String,
    pub(super) left_out: Vec<String>,
}

#[derive(Debug)]
enum Source {
    /// Without a name of its own.
    Code(String),
    Files {
        files: BTreeMap<String, String>,
        /// `None`: the server finds what the project declares.
        entrypoint: Option<String>,
    },
}

/// Reads everything the command line names.
pub(super) fn gather(args: &SubmitArgs) -> Result<Program, Failure> {
    let from_stdin = |path: &Path| path == Path::new("-");
    if from_stdin(&args.source) && args.stdin.as_deref().is_some_and(from_stdin) {
        return Err(Failure::usage(
            "standard input cannot be both the code and what the program reads",
            "both are given as -",
            "Put one of them into a file.",
        ));
    }
    let taken = from_stdin(&args.source) || args.stdin.as_deref().is_some_and(from_stdin);
    if args.interactive && taken {
        return Err(Failure::usage(
            "standard input cannot be sent with the submission and while it runs",
            "--interactive and - are both given",
            "Put the code or the input into a file, or leave out --interactive.",
        ));
    }
    let mut left_out = Vec::new();
    let (language, mut source) = if from_stdin(&args.source) {
        code(args, collect::standard_input()?)?
    } else {
        let metadata = std::fs::metadata(&args.source)
            .map_err(|error| collect::unreadable(&args.source, &error))?;
        if metadata.is_dir() {
            let folder = collect::folder(&args.source)?;
            left_out.clone_from(&folder.left_out);
            of_folder(args, folder)?
        } else {
            of_file(args, metadata.is_file())?
        }
    };
    let tests = tests(args, &mut source)?;
    // Without input the program reads an end of file: nobody is there to type.
    let stdin = match args.stdin.as_deref() {
        None => String::new(),
        Some(path) if from_stdin(path) => collect::standard_input()?,
        Some(path) => collect::required_text(path)?,
    };
    Ok(Program {
        language,
        source,
        tests,
        stdin,
        left_out,
    })
}

/// The message, refused here when it is larger than the server takes.
pub(super) fn compose(
    args: &SubmitArgs,
    program: Program,
    user: &UserId,
) -> Result<Message, Failure> {
    let id = SubmissionId::new();
    let mut fields = Map::new();
    let mut put = |name: &str, value: Value| fields.insert(name.to_owned(), value);
    put("user_id", json!(user));
    put("submission_id", json!(id));
    put("language", json!(program.language.name));
    match program.source {
        Source::Code(code) => put("code", json!(code)),
        Source::Files { files, entrypoint } => {
            if let Some(entrypoint) = entrypoint {
                put("entrypoint", json!(entrypoint));
            }
            put("files", json!(files))
        }
    };
    if let Some(repl) = &args.repl {
        put("repl_id", json!(repl));
    }
    put("stdin", json!(program.stdin));
    if args.interactive {
        put("interactive", json!(true));
    }
    put("args", json!(args.args));
    put(
        "env",
        json!(args.env.iter().cloned().collect::<BTreeMap<_, _>>()),
    );
    if let Some(tests) = program.tests {
        put("tests", tests);
    }
    put("limits", limits(args));
    put("deploy", json!(!args.no_deploy));
    put("database", json!(!args.no_database));
    if args.worker {
        put("serves", json!(false));
    }
    put("stream", json!(true));
    let text = Value::Object(fields).to_string();
    if text.len() > MAX_MESSAGE_BYTES {
        return Err(Failure::usage(
            format!(
                "the submission is {} as a message",
                render::bytes(text.len() as u64)
            ),
            format!(
                "the server takes messages of at most {}; code, tests and input go in one",
                render::bytes(MAX_MESSAGE_BYTES as u64)
            ),
            "Make the code, the tests or the input smaller, or let the program fetch what it needs.",
        ));
    }
    Ok(Message { id, text })
}

/// Only the limits that were asked for.
fn limits(args: &SubmitArgs) -> Value {
    let mut limits = json!(args.limits.request());
    if let Value::Object(fields) = &mut limits {
        fields.retain(|_, value| !value.is_null());
    }
    limits
}

/// The language a file's name tells.
fn language_of(name: &str) -> Option<&'static Language> {
    let extension = Path::new(name).extension()?.to_str()?.to_ascii_lowercase();
    Language::of_extension(&extension)
}

fn unknown_language(what: &str) -> Failure {
    let extensions: Vec<&str> = LANGUAGES
        .iter()
        .flat_map(|language| language.extensions.iter().copied())
        .collect();
    Failure::usage(
        format!("which language is {what}?"),
        format!(
            "its name does not tell; known extensions are {}",
            extensions.join(", ")
        ),
        format!("Name the language with --language: {}.", Language::names()),
    )
}

/// Code without a name: standard input, or a pipe that stands for a file.
fn code(args: &SubmitArgs, code: String) -> Result<(&'static Language, Source), Failure> {
    if let Some(entrypoint) = &args.entrypoint {
        let language = args
            .language
            .or_else(|| language_of(entrypoint))
            .ok_or_else(|| unknown_language(entrypoint))?;
        let files = BTreeMap::from([(entrypoint.clone(), code)]);
        return Ok((
            language,
            Source::Files {
                files,
                entrypoint: Some(entrypoint.clone()),
            },
        ));
    }
    // The message's own default.
    let language = args.language.or_else(|| Language::named("python"));
    let language = language.ok_or_else(|| unknown_language("standard input"))?;
    Ok((language, Source::Code(code)))
}

fn of_file(args: &SubmitArgs, regular: bool) -> Result<(&'static Language, Source), Failure> {
    let text = collect::required_text(&args.source)?;
    if !regular {
        return code(args, text);
    }
    let name = file_name(&args.source)?;
    let language = args
        .language
        .or_else(|| language_of(&name))
        .ok_or_else(|| unknown_language(&name))?;
    // The file keeps its name: tests import it by that, and tracebacks show it.
    let entrypoint = args.entrypoint.clone().unwrap_or_else(|| name.clone());
    let files = BTreeMap::from([(entrypoint.clone(), text)]);
    let entrypoint = Some(entrypoint);
    Ok((language, Source::Files { files, entrypoint }))
}

fn file_name(path: &Path) -> Result<String, Failure> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| {
        Failure::usage(
            format!("{} cannot be sent under its name", path.display()),
            "its name is not UTF-8 text",
            "Rename it, or name it for the server with --entrypoint.",
        )
    })
}

fn of_folder(args: &SubmitArgs, folder: Folder) -> Result<(&'static Language, Source), Failure> {
    let files = folder.files;
    let has = |language: &&Language| files.contains_key(language.entrypoint);
    let only = if files.len() == 1 {
        files.keys().next()
    } else {
        None
    };
    let is_project = |language: &&Language| {
        let file = language.project;
        file.is_some_and(|file| files.contains_key(file))
    };
    // One with types has the project file of the other, too.
    let mut projects = LANGUAGES.iter().rev().filter(is_project);
    let project = match (projects.next(), projects.next()) {
        (Some(language), None) => Some(language),
        (Some(language), Some(second))
            if language.name == "typescript" && second.name == "node" =>
        {
            Some(language)
        }
        _ => None,
    };
    let known = args
        .language
        .filter(is_project)
        .or(project.filter(|_| args.language.is_none()));
    if let (Some(language), None) = (known, &args.entrypoint) {
        let entrypoint = None;
        return Ok((language, Source::Files { files, entrypoint }));
    }
    let (language, entrypoint) = match (args.language, &args.entrypoint) {
        (language, Some(entrypoint)) => (language, Some(entrypoint.clone())),
        (Some(language), None) if has(&language) => {
            (Some(language), Some(language.entrypoint.to_owned()))
        }
        (Some(language), None) => (Some(language), only.cloned()),
        (None, None) => {
            let mut candidates = LANGUAGES.iter().filter(|language| has(language));
            match (candidates.next(), candidates.next()) {
                (Some(language), None) => (Some(language), Some(language.entrypoint.to_owned())),
                (None, _) => (None, only.cloned()),
                (Some(_), Some(_)) => (None, None),
            }
        }
    };
    let Some(entrypoint) = entrypoint else {
        let usual: Vec<&str> = LANGUAGES
            .iter()
            .map(|language| language.entrypoint)
            .collect();
        return Err(Failure::usage(
            format!("which file of {} is to be run?", args.source.display()),
            format!("exactly one of {} is expected in it", usual.join(", ")),
            "Name it with --entrypoint.",
        ));
    };
    if !files.contains_key(&entrypoint) {
        return Err(Failure::usage(
            format!("{} is not one of the files", render::printable(&entrypoint)),
            format!("it is looked for in {}", args.source.display()),
            "Name the entrypoint by its path inside the folder.",
        ));
    }
    let language = language
        .or_else(|| language_of(&entrypoint))
        .ok_or_else(|| unknown_language(&entrypoint))?;
    let entrypoint = Some(entrypoint);
    Ok((language, Source::Files { files, entrypoint }))
}

/// The `tests` field. Test files join a folder's files; beside one file they are sent on their own.
fn tests(args: &SubmitArgs, source: &mut Source) -> Result<Option<Value>, Failure> {
    let is_cases = |path: &Path| {
        path.extension()
            .is_some_and(|extension| extension == "json")
    };
    let (cases, files): (Vec<_>, Vec<_>) = args.tests.iter().partition(|path| is_cases(path));
    match (cases.is_empty(), files.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Err(Failure::usage(
            "test cases and test files cannot be sent together",
            "--tests names both a .json file of cases and test files",
            "Send them in two submissions, or write the cases as test files.",
        )),
        (false, true) => {
            let mut all = Vec::new();
            for path in cases {
                all.extend(read_cases(path)?);
            }
            Ok(Some(json!(all)))
        }
        (true, false) => {
            let mut names = Vec::new();
            for path in files {
                names.push(add_test_file(args, path, source)?);
            }
            Ok(Some(json!(names)))
        }
    }
}

fn read_cases(path: &Path) -> Result<Vec<Case>, Failure> {
    let text = collect::required_text(path)?;
    serde_json::from_str(&text).map_err(|error| {
        Failure::usage(
            format!("{} does not hold test cases", path.display()),
            error.to_string(),
            "Write an array: [{\"name\":\"adds\",\"stdin\":\"1 2\\n\",\"expected_stdout\":\"3\\n\"}]; args, compare and timeout_ms may stand there too.",
        )
    })
}

/// Puts a test file among the files and returns its name there.
fn add_test_file(args: &SubmitArgs, path: &Path, source: &mut Source) -> Result<String, Failure> {
    let text = collect::required_text(path)?;
    let name = name_in_folder(&args.source, path).map_or_else(|| file_name(path), Ok)?;
    let files = match source {
        Source::Files { files, .. } => files,
        Source::Code(_) => {
            return Err(Failure::usage(
                "test files need code with a name",
                "code from standard input has none that they could import",
                "Name it with --entrypoint, such as --entrypoint app.py.",
            ));
        }
    };
    match files.get(&name) {
        Some(there) if *there != text => Err(Failure::usage(
            format!("{} is already one of the files", render::printable(&name)),
            format!("{} would take its place", path.display()),
            "Give the test file another name.",
        )),
        _ => {
            files.insert(name.clone(), text);
            Ok(name)
        }
    }
}

/// Where the test file lies in the folder that is sent, if it does.
fn name_in_folder(folder: &Path, path: &Path) -> Option<String> {
    let folder = folder
        .canonicalize()
        .ok()
        .filter(|folder| folder.is_dir())?;
    let inner = path.canonicalize().ok()?;
    Some(inner.strip_prefix(folder).ok()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: SubmitArgs,
    }

    fn parse(line: &[&str]) -> SubmitArgs {
        let line = ["submit"].iter().chain(line);
        Line::try_parse_from(line).unwrap().args
    }

    /// The message of this command line, without its id.
    fn composed(line: &[&str]) -> Result<Value, Failure> {
        let args = parse(line);
        let user = "test".parse().unwrap();
        let message = compose(&args, gather(&args)?, &user)?;
        let mut json: Value = serde_json::from_str(&message.text).unwrap();
        let id = json.as_object_mut().unwrap().remove("submission_id");
        assert_eq!(id, Some(json!(message.id)));
        Ok(json)
    }

    #[test]
    fn the_extension_tells_the_language() {
        let name = |file| language_of(file).map(|language| language.name);
        for (file, language) in [
            ("app.py", Some("python")),
            ("a.b.JS", Some("node")),
            ("x.mjs", Some("node")),
            ("run.sh", Some("bash")),
            ("Makefile", None),
            ("a.c", Some("c")),
            ("a.zig", None),
            (".py", None),
        ] {
            assert_eq!(name(file), language, "{file}");
        }
    }

    #[test]
    fn a_file_is_sent_under_its_name_with_everything_the_options_say() {
        let temp = tempfile::tempdir().unwrap();
        let app = temp.path().join("app.py");
        fs::write(&app, "print(1)").unwrap();
        let app = app.to_str().unwrap();
        assert_eq!(
            composed(&[app]).unwrap(),
            json!({"user_id":"test","language":"python","entrypoint":"app.py","files":{"app.py":"print(1)"},
                "stdin":"","args":[],"env":{},"limits":{},"deploy":true,"database":true,"stream":true})
        );
        let line = [
            app,
            "--no-deploy",
            "--no-database",
            "--worker",
            "--repl",
            "shop",
            "--arg",
            "-v",
            "--arg",
            "x",
            "--env",
            "A=b=c",
            "--wall",
            "30s",
            "--memory",
            "256M",
            "--entrypoint",
            "main.py",
        ];
        let json = composed(&line).unwrap();
        assert_eq!(json["deploy"], false);
        assert_eq!(json["database"], false);
        assert_eq!(json["serves"], false);
        assert_eq!(json["repl_id"], "shop");
        assert_eq!(json["args"], json!(["-v", "x"]));
        assert_eq!(json["env"], json!({"A":"b=c"}));
        assert_eq!(
            json["limits"],
            json!({"wall_ms":30_000,"memory_bytes":256 << 20})
        );
        assert_eq!(json["files"], json!({"main.py":"print(1)"}));
    }

    #[test]
    fn a_folder_is_run_from_its_main_file_or_the_one_that_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().to_str().unwrap();
        fs::write(temp.path().join("app.js"), "1").unwrap();
        assert_eq!(composed(&[root]).unwrap()["entrypoint"], "app.js");
        fs::write(temp.path().join("b.js"), "2").unwrap();
        assert!(
            composed(&[root])
                .unwrap_err()
                .problem
                .remediation
                .contains("--entrypoint")
        );
        assert_eq!(
            composed(&[root, "--entrypoint", "b.js"]).unwrap()["language"],
            "node"
        );
        assert!(composed(&[root, "--entrypoint", "c.js"]).is_err());
        fs::write(temp.path().join("main.py"), "3").unwrap();
        let json = composed(&[root]).unwrap();
        assert_eq!(
            (&json["entrypoint"], &json["language"]),
            (&json!("main.py"), &json!("python"))
        );
        fs::write(temp.path().join("main.sh"), "4").unwrap();
        assert!(composed(&[root]).is_err(), "two main files");
        // What a project runs is the server's to find.
        let package = temp.path().join("package.json");
        fs::write(&package, "{}").unwrap();
        let json = composed(&[root]).unwrap();
        assert_eq!(
            (&json["entrypoint"], &json["language"]),
            (&json!(null), &json!("node"))
        );
        fs::remove_file(&package).unwrap();
        assert_eq!(
            composed(&[root, "-l", "bash"]).unwrap()["entrypoint"],
            "main.sh"
        );
    }

    #[test]
    fn tests_are_cases_or_files_and_never_both() {
        let temp = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = temp.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let app = put("src/app.py", "x");
        let cases = put(
            "cases.json",
            r#"[{"name":"a","stdin":"1","expected_stdout":"2"}]"#,
        );
        let test = put("src/tests/test_app.py", "import app");
        let wrong = put("wrong.json", r#"[{"nome":"a"}]"#);

        let json = composed(&[&app, "--tests", &cases, "--tests", &cases]).unwrap();
        assert_eq!(json["tests"].as_array().unwrap().len(), 2);
        assert_eq!(
            json["tests"][0],
            json!({"name":"a","stdin":"1","expected_stdout":"2"})
        );

        let json = composed(&[&app, "--tests", &test]).unwrap();
        assert_eq!(json["tests"], json!(["test_app.py"]));
        assert_eq!(json["files"]["test_app.py"], "import app");

        let folder = temp.path().join("src");
        let json = composed(&[
            folder.to_str().unwrap(),
            "--entrypoint",
            "app.py",
            "--tests",
            &test,
        ])
        .unwrap();
        assert_eq!(json["tests"], json!(["tests/test_app.py"]));

        assert!(composed(&[&app, "--tests", &test, "--tests", &cases]).is_err());
        let refused = composed(&[&app, "--tests", &wrong]).unwrap_err();
        assert!(refused.problem.cause.contains("nome"), "{refused:?}");
        assert!(
            composed(&[&app, "--tests", &app]).is_ok(),
            "a program may hold its own tests"
        );
    }

    #[test]
    fn every_message_is_one_the_server_understands() {
        use crate::model::{Limits, SubmissionRequest, Tests};
        let temp = tempfile::tempdir().unwrap();
        let app = temp.path().join("app.py");
        let test = temp.path().join("test_app.py");
        fs::write(&app, "x").unwrap();
        fs::write(&test, "y").unwrap();
        let args = parse(&[
            app.to_str().unwrap(),
            "--tests",
            test.to_str().unwrap(),
            "--cpu",
            "1s",
        ]);
        let message = compose(&args, gather(&args).unwrap(), &"test".parse().unwrap()).unwrap();
        let request: SubmissionRequest = serde_json::from_str(&message.text).unwrap();
        assert!(request.stream());
        let submission = request.validate(&Limits::MAXIMUM).unwrap();
        assert_eq!(submission.id, message.id);
        assert_eq!(submission.entrypoint.unwrap().as_str(), "app.py");
        assert_eq!(submission.stdin.as_deref(), Some(""));
        assert!(matches!(submission.tests, Tests::Files(files) if files.len() == 1));
    }

    #[test]
    fn what_the_server_would_refuse_for_its_size_is_not_sent() {
        let temp = tempfile::tempdir().unwrap();
        let app = temp.path().join("app.py");
        // Fits as text; as JSON every line end takes two bytes.
        fs::write(&app, "\n".repeat(700_000)).unwrap();
        let refused = composed(&[app.to_str().unwrap()]).unwrap_err();
        assert!(refused.problem.message.contains("1.3 MiB"), "{refused:?}");
        fs::write(&app, "\n".repeat(2_000_000)).unwrap();
        let refused = composed(&[app.to_str().unwrap()]).unwrap_err();
        assert!(refused.problem.message.contains("too big"), "{refused:?}");
    }
}
