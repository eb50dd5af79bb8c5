//! What the text of a source tells of whether a program begins in it. Compilers are not asked: this says only
//! which file is meant, and what it takes for a program the compiler still has to take.

use std::borrow::Cow;

use super::Files;
use crate::model::RelativePath;

/// Folder of a file, empty at the top.
pub fn folder(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// Whether programs of the language begin in a function or class that their sources name.
pub fn has_main_words(language: &str) -> bool {
    matches!(language, "c" | "cpp" | "java" | "go" | "rust")
}

/// What such a source has, in words.
pub fn has_main(language: &str) -> &'static str {
    match language {
        "java" => "a class with public static void main",
        "go" => "package main and func main",
        _ => "a function main",
    }
}

/// Whether a program begins in this source.
pub fn is_program(language: &str, path: &str, text: &str) -> bool {
    match language {
        "c" | "cpp" => defines_main(text),
        "java" => main_class(text).is_some(),
        "go" => {
            let has = |words: &str| text.lines().any(|line| line.starts_with(words));
            has("package main") && has("func main(") && is_for_linux(path, text)
        }
        "rust" => text.lines().any(|line| {
            let line = line.strip_prefix("pub ").unwrap_or(line);
            line.strip_prefix("async ")
                .unwrap_or(line)
                .starts_with("fn main(")
        }),
        _ => true,
    }
}

/// Whether Go compiles the file here, as its name and its first lines say.
pub fn is_for_linux(path: &str, text: &str) -> bool {
    const OTHERS: [&str; 14] = [
        "aix",
        "android",
        "darwin",
        "dragonfly",
        "freebsd",
        "illumos",
        "ios",
        "js",
        "netbsd",
        "openbsd",
        "plan9",
        "solaris",
        "wasip1",
        "windows",
    ];
    let parts: Vec<&str> = path.split('/').collect();
    let Some((name, folders)) = parts.split_last() else {
        return false;
    };
    // Go passes over these folders itself; what is in the others is no part of the program.
    let ignored = |part: &&str| {
        part.starts_with(['_', '.']) || matches!(*part, "testdata" | "vendor" | "examples")
    };
    if folders.iter().any(ignored) || name.ends_with("_test.go") {
        return false;
    }
    let stem = name.strip_suffix(".go").unwrap_or(name);
    let mut words = stem.split('_').skip(1);
    if words.any(|word| OTHERS.contains(&word)) {
        return false;
    }
    let rules = text
        .lines()
        .take_while(|line| !line.starts_with("package "));
    let mut rules = rules.filter_map(|line| line.strip_prefix("//go:build "));
    !rules.any(|rule| {
        let rule = rule.trim();
        rule == "!linux"
            || rule == "!unix"
            || rule.split("||").all(|one| {
                let one = one.trim();
                one == "ignore" || OTHERS.contains(&one)
            })
    })
}

/// Whether a script is run as a module of its package: it imports its neighbours by relative names.
pub fn runs_as_module(path: &str, text: &str) -> bool {
    let plain =
        |part: &str| !part.is_empty() && part.chars().all(|c| c == '_' || c.is_alphanumeric());
    let Some(stem) = path.strip_suffix(".py") else {
        return false;
    };
    path.contains('/')
        && stem.split('/').all(plain)
        && text
            .lines()
            .any(|line| line.trim_start().starts_with("from ."))
}

/// Whether a script only has what others use: nothing happens when it is run.
pub fn is_library(language: &str, text: &str) -> bool {
    match language {
        "python" => {
            let plain = strip_triple(text);
            let mut top = plain
                .lines()
                .filter(|line| !line.trim().is_empty() && !line.starts_with([' ', '\t']));
            let mut defines = false;
            top.all(|line| {
                let begins = |words: &[&str]| words.iter().any(|word| line.starts_with(word));
                let definition = begins(&["def ", "class ", "async def "]);
                defines |= definition;
                definition
                    || begins(&["import ", "from ", "@", "#", ")", "]", "}", "\"", "'"])
                    || is_assignment(line)
            }) && defines
        }
        "node" | "typescript" => {
            let exports = ["module.exports", "exports.", "\nexport "];
            let acts = ["listen(", "console.", "process."];
            let text = format!("\n{text}");
            exports.iter().any(|word| text.contains(word))
                && !acts.iter().any(|word| text.contains(word))
        }
        _ => false,
    }
}

/// `NAME = value` or `NAME: type = value`, without a call.
fn is_assignment(line: &str) -> bool {
    let name = line.split([' ', '=', ':']).next().unwrap_or_default();
    let plain = name.chars().all(|c| c == '_' || c.is_alphanumeric());
    plain && line.contains('=') && !line.contains('(')
}

/// A text without what is between triple quotes.
fn strip_triple(text: &str) -> Cow<'_, str> {
    if !text.contains("\"\"\"") && !text.contains("'''") {
        return Cow::Borrowed(text);
    }
    let mut rest = text;
    let mut plain = String::new();
    while let Some(at) = ["\"\"\"", "'''"]
        .iter()
        .filter_map(|quote| rest.find(quote))
        .min()
    {
        let quote = &rest[at..at + 3];
        plain.push_str(&rest[..at]);
        let after = &rest[at + 3..];
        match after.find(quote) {
            Some(end) => rest = &after[end + 3..],
            None => return Cow::Owned(plain),
        }
    }
    plain.push_str(rest);
    Cow::Owned(plain)
}

/// Words of a line that takes another file in.
const IMPORTS: [&str; 10] = [
    "import", "from", "require", "include", "source", ". ", "use", "do ", "dofile", "load",
];

/// Names of files that are never a project's program.
fn is_beside(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or_default();
    matches!(stem, "__init__" | "conftest" | "setup" | "noxfile")
        || stem.starts_with("test_")
        || stem.ends_with("_test")
        || name.contains(".test.")
        || name.contains(".spec.")
        || name.contains(".config.")
        || name.ends_with(".d.ts")
}

/// Sources that no other file takes in, and of those the ones that say they are programs, if any do.
pub fn nobodys(language: &str, sources: &[&RelativePath], files: &Files) -> Vec<RelativePath> {
    let lines: Vec<(&RelativePath, &str)> = files
        .iter()
        .flat_map(|(path, text)| text.lines().map(move |line| (path, line)))
        .filter(|(_, line)| IMPORTS.iter().any(|word| line.contains(word)))
        .collect();
    let free = sources.iter().filter(|path| {
        let name = path.as_str().rsplit('/').next().unwrap_or_default();
        let stem = name.split('.').next().unwrap_or_default();
        let beside = is_beside(name);
        let is_taken = |(from, line): &(&RelativePath, &str)| from != *path && has_word(line, stem);
        !beside && !lines.iter().any(is_taken)
    });
    let free: Vec<RelativePath> = free.map(|path| (*path).clone()).collect();
    let says = |path: &&RelativePath| {
        let text = files.get(*path).map_or("", String::as_str);
        match language {
            "python" => text.contains("__name__"),
            _ => text.starts_with("#!"),
        }
    };
    let programs: Vec<RelativePath> = free.iter().filter(says).cloned().collect();
    match (free.len(), programs.len()) {
        (2.., 1) => programs,
        _ => free,
    }
}

/// Whether a line has this word, and not only as a part of another.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c == '_' || c.is_alphanumeric();
    !word.is_empty()
        && line.match_indices(word).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            let after = line[at + word.len()..].chars().next();
            !before.is_some_and(is_part) && !after.is_some_and(is_part)
        })
}

/// The text of a C, C++ or Java source, with blanks for comments, texts and characters.
fn without_texts(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, rest.peek()) {
            ('/', Some('/')) => {
                while rest.peek().is_some_and(|next| *next != '\n') {
                    rest.next();
                }
            }
            ('/', Some('*')) => {
                let mut last = ' ';
                rest.next();
                for next in rest.by_ref() {
                    if next == '\n' {
                        plain.push('\n');
                    }
                    if last == '*' && next == '/' {
                        break;
                    }
                    last = next;
                }
                plain.push(' ');
            }
            ('"' | '\'', _) => {
                // One that has no end ends with its line.
                while let Some(next) = rest.next() {
                    match next {
                        '\\' => drop(rest.next()),
                        '\n' => {
                            plain.push('\n');
                            break;
                        }
                        next if next == c => break,
                        _ => {}
                    }
                }
                plain.push(' ');
            }
            _ => plain.push(c),
        }
    }
    plain
}

/// Whether a C or C++ source defines `main`, whatever it is compiled with.
fn defines_main(text: &str) -> bool {
    let plain = without_texts(text);
    let (mut code, mut conditions) = (String::with_capacity(plain.len()), 0_u32);
    for line in plain.lines() {
        match line.trim_start().strip_prefix('#').map(str::trim_start) {
            Some(rule) if rule.starts_with("if") => conditions += 1,
            Some(rule) if rule.starts_with("endif") => conditions = conditions.saturating_sub(1),
            Some(_) => {}
            None if conditions == 0 => code.push_str(line),
            None => {}
        }
        code.push('\n');
    }
    let mut depth = 0_usize;
    let mut before = 0;
    for (at, c) in code.char_indices() {
        match c {
            '{' if code[before..at].trim_end().ends_with("extern") => {}
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            '(' if depth == 0 => {
                let name = code[..at].trim_end();
                let own = name.strip_suffix("main");
                let whole = own.is_some_and(|own| {
                    own.is_empty() || own.ends_with(|c: char| !(c == '_' || c.is_alphanumeric()))
                });
                let after = code[at..]
                    .split_once(')')
                    .map(|(_, rest)| rest.trim_start());
                let is_body = after.is_some_and(|rest| {
                    !rest.starts_with([';', ',', '(', ')', '=']) && !rest.is_empty()
                });
                if whole && is_body {
                    return true;
                }
                continue;
            }
            _ => {}
        }
        if matches!(c, ';' | '}') {
            before = at + 1;
        }
    }
    false
}

/// The Java class with the `main` of a source, below the package that it names.
pub fn main_class(text: &str) -> Option<String> {
    let plain = without_texts(text);
    let mut words: Vec<&str> = Vec::new();
    let mut classes: Vec<(usize, String)> = Vec::new();
    let (mut depth, mut package) = (0_usize, None);
    let mut named: Option<String> = None;
    let is_part = |c: char| c == '_' || c == '$' || c == '.' || c.is_alphanumeric();
    let mut at = 0;
    while let Some(c) = plain[at..].chars().next() {
        if is_part(c) {
            let length = plain[at..]
                .find(|c| !is_part(c))
                .unwrap_or(plain.len() - at);
            let word = &plain[at..at + length];
            match words.last() {
                Some(&("class" | "interface" | "enum" | "record")) => named = Some(word.to_owned()),
                Some(&"package") => package = Some(word),
                _ => {}
            }
            words.push(word);
            at += length;
            continue;
        }
        match c {
            '{' => {
                depth += 1;
                if let Some(name) = named.take() {
                    classes.push((depth, name));
                }
                words.clear();
            }
            '}' => {
                classes.retain(|(own, _)| *own < depth);
                depth = depth.saturating_sub(1);
                words.clear();
            }
            ';' => words.clear(),
            '(' if words.ends_with(&["void", "main"]) && words.contains(&"static") => {
                if let [(1, name)] = &classes[..] {
                    return Some(match package {
                        Some(package) => format!("{package}.{name}"),
                        None => name.clone(),
                    });
                }
            }
            _ => {}
        }
        at += c.len_utf8();
    }
    None
}

/// The public class of a Java source: its file has to have its name.
pub fn public_class(text: &str) -> Option<String> {
    let plain = without_texts(text);
    let is_part = |c: char| c == '_' || c == '$' || c.is_alphanumeric();
    plain.lines().find_map(|line| {
        let rest = line.trim_start().strip_prefix("public ")?;
        let mut words = rest.split(|c| !is_part(c)).filter(|word| !word.is_empty());
        let mut before = "";
        loop {
            let word = words.next()?;
            if matches!(before, "class" | "interface" | "enum" | "record") {
                return Some(word.to_owned());
            }
            if !matches!(
                word,
                "final"
                    | "abstract"
                    | "sealed"
                    | "strictfp"
                    | "class"
                    | "interface"
                    | "enum"
                    | "record"
            ) {
                return None;
            }
            before = word;
        }
    })
}
