//! What programs depend on: how a project's own file names it, and where it may be installed from.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::LANGUAGES;
use super::language::quoted;

/// A kind of package index.
#[derive(Debug, PartialEq, Eq)]
pub struct Registry {
    /// The operator's variable that names the index: the installer's own, where it has one.
    pub variable: &'static str,
    /// The index that everybody uses, taken when the operator names none.
    pub usual: &'static str,
    /// Hosts that the usual one sends its callers to.
    pub beside: &'static [&'static str],
}

/// How a project's file shows that it names packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// Each line that is not empty and no comment names one.
    Lines,
    /// JSON: an object under one of these keys has members.
    Members(&'static [&'static str]),
    /// TOML: something is below a heading that ends in one of these words, or the heading goes on.
    Headings(&'static [&'static str]),
    /// A line begins with this word.
    Word(&'static str),
}

/// How what a project depends on is installed, where the operator allows it.
///
/// In its command and variables `{index}` stands for the index's URL, and `{hosts}` for the hosts that
/// packages come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Install {
    /// The installer's name.
    pub name: &'static str,
    /// How to install the installer.
    pub install: &'static str,
    /// Where the packages come from.
    pub registry: &'static Registry,
    /// The file that names them.
    pub file: &'static str,
    /// How it names them.
    pub naming: Naming,
    /// Files beside it that the installer reads.
    pub beside: &'static [&'static str],
    /// What leads from the file to other files of the project: looked for in its lines, without the spaces
    /// at their ends, each with a line's end before it.
    pub elsewhere: &'static [&'static str],
    /// Command.
    pub argv: &'static [&'static str],
    /// Its variables.
    pub env: &'static [(&'static str, &'static str)],
    /// Its variables beside those, for an index without TLS.
    pub plain_env: &'static [(&'static str, &'static str)],
    /// Folders of the workspace that packages go to.
    pub folders: &'static [&'static str],
    /// Folders below those that hold nothing but packages, for a workspace: what else is there is its user's.
    pub own: &'static [&'static str],
    /// Programs need those folders when they run, not only when they are compiled.
    pub needed_to_run: bool,
    /// Variables of the compiler, when packages were installed.
    pub compile_env: &'static [(&'static str, &'static str)],
}

/// What an installation ends with when its index failed: "temporary failure" of sysexits.h, which no installer of
/// the table ends with by itself.
pub const INDEX_FAILED: i32 = 75;

/// What a line begins with that tells how the index failed.
pub const INDEX_SAID: &str = "The package index failed: ";

/// What a line begins with that tells that there is no installer.
pub const NO_INSTALLER: &str = "There is no installer: ";

/// Runs an installer, and again when its index failed. Its first argument is an extended regular expression for
/// what installers say then; the installer follows.
///
/// An installer's own end says nothing of whose fault it was: pip finds no such package behind an index that
/// answers 503, and tells of that in its log only. What it writes is passed on while it runs. One that was ended by
/// a signal is still seen to be. With a log of its own pip no longer shows what a package wrote while it was built,
/// so that is told from there, without the time before each line.
const PATIENT: &str = "words=$1; shift; \
     command -v \"$1\" >/dev/null || { echo \"There is no installer: $1 is not there\" >&2; exit 127; }; \
     told=$(mktemp -d) && mkfifo \"$told/pipe\" || exit 1; \
     export PIP_LOG=\"$told/log\"; \
     for pause in 1 3 end; do \
     rm -f \"$told/log\"; tee \"$told/said\" <\"$told/pipe\" >&2 & teller=$!; \
     \"$@\" 2>\"$told/pipe\"; code=$?; \
     for wait in 0.02 0.1 0.2 0.5 1; do kill -0 $teller 2>/dev/null || break; sleep $wait; done; \
     [ $code -ne 0 ] || break; \
     why=$(cat \"$told/said\" \"$told/log\" 2>/dev/null | grep -aE \"$words\" \
     | grep -avE '(response|failed:) 403' | head -n 1 | cut -c 1-500); \
     if [ -z \"$why\" ]; then \
     sed -n '/ Running command /,$p' \"$told/log\" 2>/dev/null | cut -c 25- >&2; break; fi; \
     if [ $pause = end ]; then echo \"The package index failed: $why\" >&2; code=75; break; fi; \
     echo \"The package index failed; it is asked again in $pause s.\" >&2; sleep $pause; \
     done; rm -rf \"$told\"; \
     [ $code -le 128 ] || kill -$((code - 128)) $$; exit $code";

/// What pip, npm, cargo and go say when an index answers that it is busy or broken, or its answers break off. What
/// curl gives a number to in cargo's words: names, connections, time, TLS, answers that are empty or cut.
const INDEX_TROUBLE: &str = "[^0-9](408|425|429|5[0-9][0-9]) (Client Error|Server Error|Request Timeout|Too Early|Too Many Requests\
     |Internal Server Error|Bad Gateway|Service Unavailable|Gateway Time)\
     |HTTP error (408|425|429|5[0-9][0-9])|code E(408|425|429|5[0-9][0-9])|got (408|425|429|5[0-9][0-9])$\
     |too many 5[0-9][0-9] error responses\
     |[Cc]onnection (was |is )?(reset|aborted|refused|closed|timed out)|Connection aborted\
     |ECONNRESET|ECONNREFUSED|ECONNABORTED|ETIMEDOUT|EPIPE|EAI_AGAIN|ERR_SOCKET_TIMEOUT|socket hang up\
     |unexpected (EOF|eof|end of file)|UNEXPECTED_EOF|: EOF$|IncompleteRead|Z_BUF_ERROR\
     |[Rr]ead ?[Tt]imed ?out|ReadTimeout|ConnectTimeout|RemoteDisconnected|Remote end closed\
     |TLS handshake timeout|i/o timeout|Client.Timeout exceeded\
     |^ *\\[(5|6|7|16|18|28|35|52|55|56|92)\\] ";

/// What an installer's command follows, for an index that fails to be asked again.
pub fn patient() -> [&'static str; 5] {
    ["sh", "-c", PATIENT, "sh", INDEX_TROUBLE]
}

/// How the index failed, if it did, in what an installer's command said.
pub fn index_failed(said: &str) -> Option<&str> {
    let mut lines = said.lines().rev();
    Some(lines.find_map(|line| line.strip_prefix(INDEX_SAID))?.trim())
}

/// Variables by which installers are told of their proxy.
pub const PROXY_VARIABLES: [&str; 4] = ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"];

/// The variable with the URL of the proxy by which a workspace's installer reaches the indexes.
pub const PACKAGE_PROXY: &str = "GANTRY_PACKAGE_PROXY";

impl Naming {
    /// Whether a project's file names any package.
    pub fn names_any(self, file: &str) -> bool {
        match self {
            Naming::Lines => file.lines().map(str::trim).any(is_content),
            Naming::Members(keys) => {
                let project: serde_json::Value = serde_json::from_str(file).unwrap_or_default();
                let objects = keys.iter().filter_map(|key| project[key].as_object());
                objects.into_iter().any(|object| !object.is_empty())
            }
            Naming::Headings(words) => below_heading(file, words),
            Naming::Word(word) => file.lines().any(|line| {
                let rest = line.trim_start().strip_prefix(word);
                rest.is_some_and(|rest| rest.starts_with([' ', '\t', '(']))
            }),
        }
    }

    /// The same as an extended regular expression for a line of the file: what passes for a name may be none, and
    /// costs an installer that finds nothing to do.
    fn pattern(self) -> String {
        match self {
            Naming::Lines => "^[[:space:]]*[^#[:space:]]".to_owned(),
            Naming::Members(keys) => format!("\"({})\"[[:space:]]*:", keys.join("|")),
            Naming::Headings(words) => format!("^[[:space:]]*\\[.*({})", words.join("|")),
            Naming::Word(word) => format!("^[[:space:]]*{word}[[:space:](]"),
        }
    }
}

fn is_content(line: &str) -> bool {
    !line.is_empty() && !line.starts_with('#')
}

fn below_heading(file: &str, words: &[&str]) -> bool {
    let mut below = false;
    for line in file.lines().map(str::trim).filter(|line| is_content(line)) {
        let Some(heading) = line.strip_prefix('[') else {
            if below {
                return true;
            }
            continue;
        };
        let heading = heading.split(']').next().unwrap_or_default();
        let parts: Vec<&str> = heading.split('.').collect();
        // `[dependencies.one]` names one by itself.
        let found = parts.iter().position(|part| words.contains(part));
        if found.is_some_and(|at| at + 1 < parts.len()) {
            return true;
        }
        below = found.is_some();
    }
    false
}

impl Install {
    /// Whether a project's file may lead to other files of the project.
    pub fn leads_elsewhere(&self, file: &str) -> bool {
        let lines = file.lines().map(str::trim);
        let lines: String = lines.flat_map(|line| ["\n", line]).collect();
        self.elsewhere.iter().any(|words| lines.contains(words))
    }

    /// What a workspace's file was when its packages were installed.
    pub fn installed(&self) -> String {
        format!("{}/.gantry-installed", self.own[0])
    }

    /// Its command, which asks an index again that failed.
    pub fn command(&self, index: &PackageIndex) -> Vec<String> {
        let own = self.argv.iter().map(|part| index.fill(part));
        patient()
            .map(str::to_owned)
            .into_iter()
            .chain(own)
            .collect()
    }

    /// The variables of its command.
    pub fn variables(&self, index: &PackageIndex) -> Vec<(&'static str, String)> {
        let plain = index.is_plain().then_some(self.plain_env);
        let own = self.env.iter().chain(plain.into_iter().flatten());
        own.map(|(name, value)| (*name, index.fill(value)))
            .collect()
    }

    /// What installs, in a shell's words, for a workspace, whose files change: nothing without a file that names
    /// packages, and nothing when it is as it was when this was done last. What failed is not taken for done, nor
    /// is a file that was changed meanwhile.
    pub fn in_shell(&self, index: &PackageIndex) -> String {
        let (file, installed) = (self.file, self.installed());
        let names_any = quoted(&self.naming.pattern());
        let folders = self.own.join(" ");
        let all = format!("cat {file} {} 2>/dev/null", self.beside.join(" "));
        let proxied = PROXY_VARIABLES.map(|name| format!("{name}=\"${PACKAGE_PROXY}\""));
        let variables = self.variables(index).into_iter();
        let variables: Vec<String> = variables
            .map(|(name, value)| format!("{name}={}", quoted(&value)))
            .collect();
        let argv = self.command(index);
        let argv: Vec<String> = argv.iter().map(|part| quoted(part)).collect();
        let found = self.compile_env.iter();
        let found: Vec<String> = found
            .map(|(name, value)| format!("export {name}={}; ", quoted(value)))
            .collect();
        format!(
            "if grep -qE {names_any} {file} 2>/dev/null; then export HOME=\"$PWD\"; \
             if ! {all} | cmp -s - {installed}; then \
             echo Installing what {file} names.; mkdir -p {folders}; \
             cp {file} {installed}.new; rm -f {installed}; {} {} {} || \
             {{ code=$?; echo What {file} names could not be installed. >&2; exit $code; }}; \
             if cmp -s {file} {installed}.new; then {all} > {installed}.new; \
             mv {installed}.new {installed}; fi; fi; {}fi; ",
            proxied.join(" "),
            variables.join(" "),
            argv.join(" "),
            found.concat(),
        )
    }
}

/// A place on the network: host and port.
pub type Place = (String, u16);

/// One index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageIndex {
    /// Its URL, for the installer.
    pub url: String,
    /// What the installer may speak to.
    pub places: BTreeSet<Place>,
}

impl PackageIndex {
    /// The index at this URL, or the usual one. `None`: it is no URL, or has a password in it, which whatever
    /// is installed could read.
    pub fn new(registry: &Registry, named: Option<&str>) -> Option<Self> {
        let url = named.unwrap_or(registry.usual);
        let (rest, port) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
            (Some(rest), _) => (rest, 443),
            (_, Some(rest)) => (rest, 80),
            _ => return None,
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        // It is put into installers' settings and commands as it is.
        let plain = |c: char| c.is_ascii_graphic() && !"@\"'\\,$`".contains(c);
        if !url.chars().all(plain) {
            return None;
        }
        let mut places = BTreeSet::from([package_place(authority, port)?]);
        // Named or not, it sends its callers to the same hosts.
        if url.trim_end_matches('/') == registry.usual.trim_end_matches('/') {
            let beside = registry.beside.iter();
            places.extend(beside.map(|host| ((*host).to_owned(), 443)));
        }
        Some(Self {
            url: url.to_owned(),
            places,
        })
    }

    /// What of an installer's command or variables stands for something of this index.
    pub fn fill(&self, part: &str) -> String {
        let hosts: Vec<&str> = self.places.iter().map(|(host, _)| host.as_str()).collect();
        part.replace("{index}", &self.url)
            .replace("{hosts}", &hosts.join(" "))
    }

    /// Whether it is spoken to without TLS.
    pub fn is_plain(&self) -> bool {
        self.url.starts_with("http:")
    }
}

/// The host and port that `host:port` or `host` names.
pub fn package_place(authority: &str, usual: u16) -> Option<Place> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().ok()?),
        None => (authority, usual),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let good = !host.is_empty() && host.chars().all(plain);
    good.then(|| (host.to_ascii_lowercase(), port))
}

/// What the operator allows to be installed; nothing unless they say so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packages {
    /// By the variable that names each.
    pub indexes: BTreeMap<&'static str, PackageIndex>,
    /// Where the packages come from that Gantry itself needs to serve modules: they are named by it and pinned, and
    /// installed also where users may install none. `None`: the operator's variable names no index that can be used.
    pub own: Option<PackageIndex>,
    /// Longest time of an installation.
    pub wall: Duration,
}

impl Packages {
    /// Longest time of an installation, unless the operator says otherwise: some hundred megabytes over a
    /// slow line.
    pub const WALL: Duration = Duration::from_secs(180);

    /// What Python packages come from, those of programs and of modules alike.
    pub fn python() -> Option<&'static Install> {
        Self::installs().find(|install| install.name == "pip")
    }

    /// The index that this installer may use.
    pub fn index(&self, install: &Install) -> Option<&PackageIndex> {
        self.indexes.get(install.registry.variable)
    }

    /// Every way to install that a language has.
    pub fn installs() -> impl Iterator<Item = &'static Install> {
        LANGUAGES.iter().filter_map(|one| one.install.as_ref())
    }

    /// Every kind of index that a language has.
    pub fn registries() -> impl Iterator<Item = &'static Registry> {
        let all: BTreeMap<&str, &Registry> = Self::installs()
            .map(|install| (install.registry.variable, install.registry))
            .collect();
        all.into_values()
    }
}

impl Default for Packages {
    fn default() -> Self {
        Self {
            indexes: BTreeMap::new(),
            own: None,
            wall: Self::WALL,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::Language;

    fn install(language: &str) -> &'static Install {
        Language::named(language).unwrap().install.as_ref().unwrap()
    }

    #[test]
    fn a_file_names_packages_or_it_does_not() {
        for (language, some, none) in [
            ("python", "# ours\n  flask\n", "\n  # flask\n"),
            (
                "node",
                r#"{"devDependencies":{"ws":"8"}}"#,
                r#"{"name":"x","dependencies":{}}"#,
            ),
            ("typescript", r#"{"dependencies":{"ws":"8"}}"#, "not JSON"),
            (
                "go",
                "module a\n\nrequire (\n\tb v1.0.0\n)\n",
                "module required\n\ngo 1.19\n",
            ),
            (
                "rust",
                "[package]\nname = \"a\"\n[dependencies]\n# none\nb = \"1\"\n",
                "[dependencies]\n[profile.release]\nlto = true\n",
            ),
            (
                "rust",
                "[target.'cfg(unix)'.dependencies]\nb = \"1\"",
                "[package]\nname = \"dependencies\"",
            ),
            ("rust", "[build-dependencies.b]\nversion = \"1\"", ""),
        ] {
            let naming = install(language).naming;
            assert!(naming.names_any(some), "{language}: {some}");
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("file"), some).unwrap();
            let mut grep = std::process::Command::new("grep");
            let grep = grep.args(["-qE", &naming.pattern(), "file"]);
            let found = grep.current_dir(folder.path()).status().unwrap();
            assert!(found.success(), "{language}: {some}");
            assert!(!naming.names_any(none), "{language}: {none}");
        }
    }

    #[test]
    fn other_files_count_where_the_file_leads_to_them() {
        for (language, leads, alone) in [
            ("python", "flask\n  -r more.txt", "my-requests\n"),
            ("python", "./own", "flask>=2 # -r"),
            (
                "node",
                r#"{"dependencies":{"a":"file:../a"}}"#,
                r#"{"dependencies":{"a":"1"}}"#,
            ),
            ("go", "replace a => ./a", "require a v1.0.0"),
            (
                "rust",
                "[dependencies]\na = { path = \"a\" }",
                "[dependencies]\na = \"1\"",
            ),
        ] {
            assert!(install(language).leads_elsewhere(leads), "{leads}");
            assert!(!install(language).leads_elsewhere(alone), "{alone}");
        }
    }

    #[test]
    fn an_index_is_a_url_without_a_password() {
        let registry = install("python").registry;
        let usual = PackageIndex::new(registry, None).unwrap();
        assert_eq!(usual.places.len(), 1 + registry.beside.len());
        let named = PackageIndex::new(registry, Some("https://pypi.org/simple/")).unwrap();
        assert_eq!(named.places, usual.places);
        let own = PackageIndex::new(registry, Some("http://Index:8080/simple")).unwrap();
        assert_eq!(own.places, BTreeSet::from([("index".to_owned(), 8080)]));
        assert_eq!(
            own.fill("{index} {hosts}"),
            "http://Index:8080/simple index"
        );
        for wrong in [
            "https://user:secret@index/simple",
            "ftp://index",
            "https://",
            "https://index:none/",
            "https://index/ x",
            "https://index/\"\nb = \"",
            "https://index,direct",
        ] {
            assert_eq!(PackageIndex::new(registry, Some(wrong)), None, "{wrong}");
        }
    }

    /// What the installers of the table say of an index that fails, and of what is wrong with what was asked for.
    #[test]
    fn an_index_that_fails_is_told_from_a_package_that_is_not_there() {
        let run = |said: &str, code: i32| {
            let index = PackageIndex::new(install("python").registry, None).unwrap();
            let told = format!("echo tried; echo {} >&2; exit {code}", quoted(said));
            let pip = Install {
                argv: &["sh", "-c"],
                ..*install("python")
            };
            let mut argv = pip.command(&index);
            // Without the pauses.
            argv[2] = argv[2].replace("sleep $pause", "true");
            argv.push(told);
            let ended = std::process::Command::new(&argv[0])
                .args(&argv[1..])
                .output()
                .unwrap();
            let tries = String::from_utf8(ended.stdout).unwrap().lines().count();
            let said = String::from_utf8(ended.stderr).unwrap();
            (ended.status.code(), tries, said.contains(INDEX_SAID))
        };
        for said in [
            "2026 Could not fetch URL https://i/simple/a/: 503 Server Error: Service Unavailable for url",
            "Could not fetch URL https://i/simple/a/: 429 Client Error: Too Many Requests for url",
            "ERROR: HTTP error 500 while getting https://i/a.whl",
            "WARNING: Retrying after connection broken by 'ProtocolError('Connection aborted.')': /simple/a/",
            "WARNING: Retrying after connection broken by 'ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 502 Bad Gateway'))': /simple/a/",
            "npm error code E503",
            "npm ERR! code E429",
            "npm error code ECONNRESET",
            "go: example.org/a@v1.0.0: reading https://i/a.mod: 502 Bad Gateway",
            "go: a: Get \"https://i/a.mod\": read tcp 1.2.3.4:5->6.7.8.9:443: read: connection reset by peer",
            "go: a: read \"https://i/a.mod\": unexpected EOF",
            "  failed to get successful HTTP response from `https://i/config.json`, got 503",
            "  [18] Transferred a partial file (end of response with 4989 bytes missing)",
            "  [56] Failure when receiving data from the peer",
        ] {
            assert_eq!(run(said, 1), (Some(INDEX_FAILED), 3, true), "{said}");
        }
        for said in [
            "ERROR: No matching distribution found for a",
            "Could not fetch URL https://i/simple/a/: 404 Client Error: Not Found for url",
            "npm error code E404",
            "go: example.org/a@v1.0.0: reading https://i/a.mod: 404 Not Found",
            "  failed to get successful HTTP response from `https://i/config.json`, got 403",
            "error[E0503]: cannot use `a`",
            // What may not be reached.
            "WARNING: Retrying after connection broken by 'ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 403 Forbidden'))': /a.whl",
            "  [56] Failure when receiving data from the peer (CONNECT tunnel failed, response 403)",
        ] {
            assert_eq!(run(said, 1), (Some(1), 1, false), "{said}");
        }
        assert_eq!(run("npm error code E503", 0), (Some(0), 1, false));
    }

    /// With a `pip` that counts: the shell's words are run by a shell.
    #[test]
    fn a_workspace_installs_once_for_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let index = PackageIndex::new(install("python").registry, None).unwrap();
        let pip = Install {
            argv: &[
                "sh",
                "-c",
                "echo \"$https_proxy $PIP_INDEX_URL\"; [ ! -f broken ]",
            ],
            compile_env: &[("FOUND", "it's here")],
            ..*install("python")
        };
        let script = format!("{}echo \"ran $FOUND\"", pip.in_shell(&index));
        let run = || {
            let mut shell = std::process::Command::new("sh");
            let shell = shell.args(["-ec", &script]).current_dir(folder.path());
            let ended = shell.env(PACKAGE_PROXY, "http://proxy").output().unwrap();
            let told = String::from_utf8(ended.stdout).unwrap();
            (ended.status.code(), told)
        };
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(run(), (Some(0), "ran \n".to_owned()));
        write("requirements.txt", "flask\n");
        let installed =
            "Installing what requirements.txt names.\nhttp://proxy https://pypi.org/simple\n";
        let ran = "ran it's here\n";
        assert_eq!(run(), (Some(0), format!("{installed}{ran}")));
        assert_eq!(run(), (Some(0), ran.to_owned()));
        write("requirements.txt", "flask\nmore\n");
        write("broken", "");
        assert_eq!(run(), (Some(1), installed.to_owned()));
        std::fs::remove_file(folder.path().join("broken")).unwrap();
        assert_eq!(run(), (Some(0), format!("{installed}{ran}")));
    }
}
