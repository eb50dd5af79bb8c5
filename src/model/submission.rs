//! A submission: what a client sends, checked once and then trusted.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::entry::{self, Files};
use super::{
    BUILD_ARCHIVE, BUILD_FOLDER, Language, Limits, LimitsRequest, MAX_CODE_BYTES, ReplId,
    SubmissionId, UserId, WORKSPACE_EXTRAS,
};

/// Most files in one submission, so that unpacking is bounded.
const MAX_FILES: usize = 1_000;
/// Longest path of a file; Linux's own bound is 4,096, and sandboxes add a prefix.
const MAX_PATH_BYTES: usize = 1_024;
/// Most test cases or test files in one submission.
const MAX_TESTS: usize = 500;
/// Most arguments or environment variables.
const MAX_ARGS: usize = 256;
/// Most bytes of arguments and environment together; Linux refuses an exec with more than 128 KiB in one string.
const MAX_ARG_BYTES: usize = 96 << 10;
/// Longest name of a test case.
const MAX_NAME_BYTES: usize = 200;

/// The beginning of a text, so that an error repeats only a little of what a client sent.
pub fn cut(mut text: String, most: usize) -> String {
    if let Some((end, _)) = text.char_indices().nth(most) {
        text.truncate(end);
        text.push('…');
        text.shrink_to_fit();
    }
    text
}

/// Which field of a message is wrong, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct FieldError {
    /// The field's path, such as `tests[2].name`.
    pub field: String,
    /// Why it was refused.
    pub reason: String,
}

impl FieldError {
    /// Longest path and reason: both may repeat what a client sent.
    const MAX_FIELD_CHARS: usize = 80;
    const MAX_REASON_CHARS: usize = 600;

    /// A field and why it was refused.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: cut(field.into(), Self::MAX_FIELD_CHARS),
            reason: cut(reason.into(), Self::MAX_REASON_CHARS),
        }
    }
}

/// A path inside a sandbox: relative, without `..`, without NUL.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RelativePath(String);

impl RelativePath {
    /// Whether it is in this folder.
    pub fn is_below(&self, folder: &str) -> bool {
        let rest = self.0.strip_prefix(folder);
        rest.is_some_and(|rest| rest.starts_with('/'))
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RelativePath {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let refuse = |why: &str| {
            let shown: String = text.chars().take(80).collect();
            Err(format!("{shown:?} {why}"))
        };
        if text.is_empty() {
            return refuse("is not a path");
        }
        if text.len() > MAX_PATH_BYTES {
            return refuse(&format!("is longer than {MAX_PATH_BYTES} bytes"));
        }
        if text.contains('\0') {
            return refuse("contains a NUL byte");
        }
        if text.starts_with('/') || text.contains('\\') {
            return refuse("is not a relative path with '/' between its parts");
        }
        if text
            .split('/')
            .any(|part| part.is_empty() || part == "." || part == ".." || part.len() > 255)
        {
            return refuse("has an empty, '.', '..' or overlong part");
        }
        Ok(Self(text))
    }
}

impl From<RelativePath> for String {
    fn from(path: RelativePath) -> String {
        path.0
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One test case: run the program with this input, expect this output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// What to call it.
    pub name: String,
    /// Its standard input; absent: the submission's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Its arguments; absent: the submission's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// What must come out on stdout; absent: exit code 0 is enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_stdout: Option<String>,
    /// When that counts as the same.
    #[serde(default, skip_serializing_if = "Compare::is_usual")]
    pub compare: Compare,
    /// Wall-clock limit of this case alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// When two outputs count as the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compare {
    /// Byte by byte.
    Exact,
    /// Line by line, without white space at the ends of lines and empty lines at the end; a line may end with
    /// CR LF as well.
    #[default]
    Trailing,
    /// Word by word; white space between words does not count.
    Tokens,
    /// Word by word, and numbers may differ by this much, absolutely or relatively.
    Floats(Tolerance),
}

impl Compare {
    fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// By how much numbers may differ.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Tolerance(f64);

// It is never NaN.
impl Eq for Tolerance {}

impl Tolerance {
    /// Whether this number is close enough to the expected one.
    pub fn allows(self, expected: f64, actual: f64) -> bool {
        (expected - actual).abs() <= self.0 * expected.abs().max(1.0)
    }
}

impl TryFrom<f64> for Tolerance {
    type Error = String;
    fn try_from(number: f64) -> Result<Self, String> {
        match (0.0..=1.0).contains(&number) {
            true => Ok(Self(number)),
            false => Err(format!("{number} is not a tolerance from 0 to 1")),
        }
    }
}

impl From<Tolerance> for f64 {
    fn from(tolerance: Tolerance) -> f64 {
        tolerance.0
    }
}

/// What decides whether the code is good.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tests {
    /// Run it; exit code 0 passes.
    #[default]
    ExitCode,
    /// Run it once per case.
    Cases(Vec<Case>),
    /// Run these files by the language's own test runner.
    Files(Vec<RelativePath>),
}

impl Tests {
    /// The test files.
    pub fn files(&self) -> &[RelativePath] {
        match self {
            Tests::Files(files) => files,
            Tests::ExitCode | Tests::Cases(_) => &[],
        }
    }
}

/// `tests` as it comes: cases, test files by name, or test files with their text.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum TestsRequest {
    Cases(Vec<Case>),
    Named(Vec<String>),
    Files(BTreeMap<String, String>),
}

/// A submission as it comes over the wire; nothing is trusted yet.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubmissionRequest {
    user_id: UserId,
    code: Option<String>,
    files: Option<BTreeMap<String, String>>,
    language: Option<String>,
    repl_id: Option<ReplId>,
    submission_id: Option<SubmissionId>,
    entrypoint: Option<String>,
    args: Option<Vec<String>>,
    stdin: Option<String>,
    env: Option<BTreeMap<String, String>>,
    tests: Option<TestsRequest>,
    limits: Option<LimitsRequest>,
    deploy: Option<bool>,
    database: Option<bool>,
    serves: Option<bool>,
    stream: Option<bool>,
    interactive: Option<bool>,
}

/// A submission that is whole and within bounds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submission {
    /// Its id.
    pub id: SubmissionId,
    /// Whose.
    pub user_id: UserId,
    /// Where it goes.
    pub repl_id: ReplId,
    /// Its language.
    pub language: &'static Language,
    /// Every file, test files included.
    pub files: BTreeMap<RelativePath, String>,
    /// The file that is run. `None`: the project's own command, or nothing where there are only tests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<RelativePath>,
    /// The program's arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Standard input sent with it; without any the program finds its end at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// The program's own environment variables.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// What decides whether it is good.
    #[serde(default)]
    pub tests: Tests,
    /// What each run may use.
    pub limits: Limits,
    /// Deploy when it passes.
    pub deploy: bool,
    /// Give the release a database.
    pub database: bool,
    /// Whether the release listens on its port. `None`: the client did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serves: Option<bool>,
    /// More standard input may come in `stdin` frames while it waits and runs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interactive: bool,
}

impl SubmissionRequest {
    /// Whether the client wants event frames before the reply.
    pub fn stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Who it says it is for; the key must be allowed to act for it.
    pub fn user_id(&self) -> &UserId {
        &self.user_id
    }

    /// The id the client chose.
    pub fn submission_id(&self) -> Option<SubmissionId> {
        self.submission_id
    }

    /// Checks everything that can be checked without I/O.
    pub fn validate(self, maximum: &Limits) -> Result<Submission, FieldError> {
        let language = match &self.language {
            None => Language::named("python"),
            Some(name) => Language::named(name),
        }
        .ok_or_else(|| {
            FieldError::new(
                "language",
                format!("is not known; known are {}", Language::names()),
            )
        })?;
        let mut files = collect_files(self.code, self.files, language)?;
        let named = self.entrypoint.map(RelativePath::try_from).transpose();
        let named = named.map_err(|e| FieldError::new("entrypoint", e))?;
        let tests = collect_tests(self.tests, &mut files, maximum)?;
        check_tree(&files)?;
        check_reserved(language, &files)?;
        let entrypoint = entry::Choice {
            language,
            files: &files,
            tests: tests.files(),
        }
        .entrypoint(named)?;
        let runs = entrypoint.is_some() || entry::start(language, &files, None).is_some();
        let args = self.args.unwrap_or_default();
        let env = self.env.unwrap_or_default();
        check_args("args", &args)?;
        check_env(&env)?;
        let limits = self
            .limits
            .unwrap_or_default()
            .resolve(maximum)
            .map_err(|(field, reason)| FieldError::new(field, reason))?;
        let repl_id = match self.repl_id {
            Some(repl_id) => repl_id,
            None => self.user_id.default_repl().ok_or_else(|| {
                FieldError::new(
                    "repl_id",
                    "is required: this user_id is too long for the default {user_id}-prod",
                )
            })?,
        };
        let interactive = self.interactive.unwrap_or(false);
        if interactive && tests != Tests::ExitCode {
            return Err(FieldError::new(
                "interactive",
                "is for a program that runs by itself: a test case has its input in its own stdin",
            ));
        }
        Ok(Submission {
            id: self.submission_id.unwrap_or_default(),
            user_id: self.user_id,
            repl_id,
            language,
            files,
            entrypoint,
            args,
            stdin: self.stdin,
            env,
            tests,
            limits,
            // A library is tested, and there is nothing of it to be released.
            deploy: runs && self.deploy.unwrap_or(true),
            database: self.database.unwrap_or(true),
            serves: self.serves,
            interactive,
        })
    }
}

fn collect_files(
    code: Option<String>,
    files: Option<BTreeMap<String, String>>,
    language: &'static Language,
) -> Result<Files, FieldError> {
    let files: Files = match (code, files) {
        (Some(_), Some(_)) => {
            return Err(FieldError::new(
                "files",
                "cannot be sent together with code",
            ));
        }
        (None, None) => return Err(FieldError::new("code", "or files is required")),
        (Some(code), None) => {
            let path = RelativePath::try_from(entry::name_of_code(language, &code))
                .map_err(|e| FieldError::new("code", e))?;
            BTreeMap::from([(path, code)])
        }
        (None, Some(files)) => {
            if files.is_empty() {
                return Err(FieldError::new("files", "is empty"));
            }
            files
                .into_iter()
                .map(|(path, text)| {
                    let path =
                        RelativePath::try_from(path).map_err(|e| FieldError::new("files", e))?;
                    Ok((path, text))
                })
                .collect::<Result<_, FieldError>>()?
        }
    };
    Ok(files)
}

/// What is compiled goes to a place of its own.
fn check_reserved(language: &Language, files: &Files) -> Result<(), FieldError> {
    let builds = language.compile.is_some();
    let taken = files.keys().find(|path| {
        [BUILD_ARCHIVE, WORKSPACE_EXTRAS].contains(&path.as_str())
            || builds && (path.as_str() == BUILD_FOLDER || path.is_below(BUILD_FOLDER))
    });
    match taken {
        Some(path) => Err(FieldError::new(
            "files",
            format!("{path} is a name that Gantry uses itself"),
        )),
        None => Ok(()),
    }
}

/// A file cannot also be a folder.
fn check_tree(files: &Files) -> Result<(), FieldError> {
    if files.len() > MAX_FILES {
        return Err(FieldError::new(
            "files",
            format!(
                "{} files are more than the {MAX_FILES} allowed",
                files.len()
            ),
        ));
    }
    let bytes: usize = files.values().map(String::len).sum();
    if bytes > MAX_CODE_BYTES {
        return Err(FieldError::new(
            "files",
            format!("{bytes} bytes are more than the {MAX_CODE_BYTES} allowed"),
        ));
    }
    for path in files.keys() {
        let mut folder = path.as_str();
        while let Some((parent, _)) = folder.rsplit_once('/') {
            if files.contains_key(&RelativePath(parent.to_owned())) {
                return Err(FieldError::new(
                    "files",
                    format!("{parent:?} is both a file and a folder"),
                ));
            }
            folder = parent;
        }
    }
    Ok(())
}

fn check_args(field: &str, args: &[String]) -> Result<(), FieldError> {
    if args.len() > MAX_ARGS || args.iter().map(String::len).sum::<usize>() > MAX_ARG_BYTES {
        return Err(FieldError::new(
            field,
            format!("is more than {MAX_ARGS} arguments or {MAX_ARG_BYTES} bytes"),
        ));
    }
    if args.iter().any(|arg| arg.contains('\0')) {
        return Err(FieldError::new(field, "contains a NUL byte"));
    }
    Ok(())
}

/// Whether these are variables that a program can be given.
pub(super) fn check_env(env: &BTreeMap<String, String>) -> Result<(), FieldError> {
    let bytes: usize = env
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    if env.len() > MAX_ARGS || bytes > MAX_ARG_BYTES {
        return Err(FieldError::new(
            "env",
            format!("is more than {MAX_ARGS} variables or {MAX_ARG_BYTES} bytes"),
        ));
    }
    for (name, value) in env {
        let good_name = !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !good_name {
            let shown: String = name.chars().take(40).collect();
            return Err(FieldError::new(
                "env",
                format!("{shown:?} is not a variable name"),
            ));
        }
        if value.contains('\0') {
            return Err(FieldError::new(
                format!("env.{name}"),
                "contains a NUL byte",
            ));
        }
    }
    Ok(())
}

fn collect_tests(
    request: Option<TestsRequest>,
    files: &mut Files,
    maximum: &Limits,
) -> Result<Tests, FieldError> {
    let named = match request {
        None => return Ok(Tests::ExitCode),
        Some(TestsRequest::Cases(cases)) if cases.is_empty() => return Ok(Tests::ExitCode),
        Some(TestsRequest::Cases(cases)) => return check_cases(cases, maximum),
        Some(TestsRequest::Named(names)) => names,
        Some(TestsRequest::Files(texts)) => {
            let names = texts.keys().cloned().collect();
            for (path, text) in texts {
                let path = RelativePath::try_from(path).map_err(|e| FieldError::new("tests", e))?;
                if files.contains_key(&path) {
                    return Err(FieldError::new(
                        "tests",
                        format!("{path} is already one of the files"),
                    ));
                }
                files.insert(path, text);
            }
            names
        }
    };
    if named.is_empty() || named.len() > MAX_TESTS {
        return Err(FieldError::new(
            "tests",
            format!("must name 1 to {MAX_TESTS} files"),
        ));
    }
    let paths = named
        .into_iter()
        .enumerate()
        .map(|(index, name)| {
            let field = format!("tests[{index}]");
            let path = RelativePath::try_from(name).map_err(|e| FieldError::new(&field, e))?;
            if files.contains_key(&path) {
                Ok(path)
            } else {
                Err(FieldError::new(
                    field,
                    format!("{path} is not one of the files"),
                ))
            }
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Tests::Files(paths))
}

fn check_cases(cases: Vec<Case>, maximum: &Limits) -> Result<Tests, FieldError> {
    if cases.len() > MAX_TESTS {
        return Err(FieldError::new(
            "tests",
            format!(
                "{} cases are more than the {MAX_TESTS} allowed",
                cases.len()
            ),
        ));
    }
    for (index, case) in cases.iter().enumerate() {
        if case.name.is_empty() || case.name.len() > MAX_NAME_BYTES {
            return Err(FieldError::new(
                format!("tests[{index}].name"),
                format!("must be 1 to {MAX_NAME_BYTES} bytes"),
            ));
        }
        if let Some(args) = &case.args {
            check_args(&format!("tests[{index}].args"), args)?;
        }
        if case
            .timeout_ms
            .is_some_and(|ms| ms == 0 || ms > maximum.wall_ms)
        {
            return Err(FieldError::new(
                format!("tests[{index}].timeout_ms"),
                format!("must be 1 to {}", maximum.wall_ms),
            ));
        }
    }
    Ok(Tests::Cases(cases))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(json: &str) -> Result<Submission, FieldError> {
        let request: SubmissionRequest = serde_json::from_str(json).unwrap();
        request.validate(&Limits::MAXIMUM)
    }

    #[test]
    fn smallest_form_is_whole() {
        let s = parse(r#"{"user_id":"test","code":"print('Hello')"}"#).unwrap();
        assert_eq!(s.repl_id.as_str(), "test-prod");
        assert_eq!(s.entrypoint.unwrap().as_str(), "main.py");
        assert!(s.deploy && s.database);
        assert_eq!(s.tests, Tests::ExitCode);
    }

    #[test]
    fn null_is_the_same_as_left_out() {
        let request = r#"{"user_id":"t","code":"","files":null,"language":null,"repl_id":null,
            "submission_id":null,"entrypoint":null,"args":null,"stdin":null,"env":null,"tests":null,
            "limits":null,"deploy":null,"database":null,"serves":null,"stream":null,
            "interactive":null}"#;
        let request: SubmissionRequest = serde_json::from_str(request).unwrap();
        assert!(!request.stream());
        let nulls = request.validate(&Limits::MAXIMUM).unwrap();
        let smallest = parse(r#"{"user_id":"t","code":""}"#).unwrap();
        assert_eq!(
            Submission {
                id: smallest.id,
                ..nulls
            },
            smallest
        );
    }

    #[test]
    fn what_is_said_of_a_release_is_kept_and_nothing_is_made_up() {
        let said = |more: &str| parse(&format!(r#"{{"user_id":"t","code":""{more}}}"#));
        assert_eq!(said("").unwrap().serves, None);
        assert_eq!(said(r#","serves":false"#).unwrap().serves, Some(false));
        let stored = serde_json::to_string(&said(r#","serves":true"#).unwrap()).unwrap();
        let read: Submission = serde_json::from_str(&stored).unwrap();
        assert_eq!(read.serves, Some(true));
    }

    #[test]
    fn paths_stay_inside() {
        for bad in [
            "../x", "/x", "a/../b", "a//b", "./a", "a/", "", "a\u{0}b", "a\\b",
        ] {
            assert!(RelativePath::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        for good in ["a", "a/b.py", "..a/b", "ü/ñ"] {
            assert!(RelativePath::try_from(good.to_owned()).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_refusal_names_its_field() {
        let cases = [
            (r#"{"user_id":"t"}"#, "code"),
            (r#"{"user_id":"t","code":"","files":{"a":""}}"#, "files"),
            (r#"{"user_id":"t","files":{"../a":""}}"#, "files"),
            (
                r#"{"user_id":"t","files":{"a":"","a/b":""},"entrypoint":"a"}"#,
                "files",
            ),
            (
                r#"{"user_id":"t","code":"","language":"cobol"}"#,
                "language",
            ),
            (
                r#"{"user_id":"t","code":"","entrypoint":"x.py"}"#,
                "entrypoint",
            ),
            (
                r#"{"user_id":"t","code":"","limits":{"wall_ms":60001}}"#,
                "limits.wall_ms",
            ),
            (r#"{"user_id":"t","code":"","env":{"A=B":""}}"#, "env"),
            (r#"{"user_id":"t","code":"","tests":["t.py"]}"#, "tests[0]"),
            (
                r#"{"user_id":"t","code":"","tests":[{"name":""}]}"#,
                "tests[0].name",
            ),
            (
                r#"{"user_id":"t","code":"","tests":[{"name":"a"}],"interactive":true}"#,
                "interactive",
            ),
        ];
        for (json, field) in cases {
            assert_eq!(parse(json).unwrap_err().field, field, "{json}");
        }
    }

    #[test]
    fn how_outputs_are_compared_has_a_default_and_bounds() {
        let compare = |field: &str| {
            let case = format!(r#"{{"name":"a"{field}}}"#);
            serde_json::from_str::<Case>(&case).map(|case| case.compare)
        };
        assert_eq!(compare("").unwrap(), Compare::Trailing);
        assert_eq!(compare(r#","compare":"exact""#).unwrap(), Compare::Exact);
        let floats = Compare::Floats(Tolerance::try_from(1e-6).unwrap());
        assert_eq!(compare(r#","compare":{"floats":1e-6}"#).unwrap(), floats);
        for wrong in ["-1", "1e9", "null", "\"x\""] {
            assert!(compare(&format!(r#","compare":{{"floats":{wrong}}}"#)).is_err());
        }
        assert!(compare(r#","compare":"roughly""#).is_err());
        let usual: Case = serde_json::from_str(r#"{"name":"a"}"#).unwrap();
        assert_eq!(serde_json::to_string(&usual).unwrap(), r#"{"name":"a"}"#);
    }

    #[test]
    fn test_files_join_the_files() {
        let s = parse(r#"{"user_id":"t","code":"","tests":{"test_a.py":"def test_a(): pass"}}"#)
            .unwrap();
        assert_eq!(s.files.len(), 2);
        assert_eq!(s.entrypoint.unwrap().as_str(), "main.py");
    }
}
