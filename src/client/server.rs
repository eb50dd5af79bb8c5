//! Which server, with which key, for which user.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use reqwest::Url;
use secrecy::SecretString;
use serde::Deserialize;

use super::collect;
use super::failure::Failure;
use super::http::Api;
use crate::model::{IdError, UserId};

/// Where a server listens that nobody configured.
const DEFAULT_ADDRESS: &str = "http://127.0.0.1:8000";
/// Longest key file read; a key is under 100 bytes.
const MAX_KEY_BYTES: u64 = 4 << 10;
/// Longest user name made from a login name: room for `-prod`, the default repl's suffix, within
/// the 50 characters a repl's name may have.
const MAX_LOGIN_LABEL: usize = 45;

/// Options that every command has.
///
/// There is no `--key`: what stands on a command line can be read by every user of the machine
/// (`ps`, `/proc/*/cmdline`) and stays in the shell's history.
#[derive(Debug, Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// The server's address [default: http://127.0.0.1:8000]
    #[arg(
        long,
        env = "GANTRY_SERVER",
        hide_env_values = true,
        value_name = "URL"
    )]
    server: Option<String>,

    /// File that holds the key; without it the key is taken from the variable API_KEY
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,

    /// The user to act for; default: the key's own user, or your login name for an admin key
    #[arg(long, env = "GANTRY_USER", hide_env_values = true, value_name = "NAME")]
    user: Option<String>,
}

impl ServerArgs {
    /// The server, ready to be asked.
    pub(super) fn api(&self) -> Result<Api, Failure> {
        let text = given(self.server.as_deref()).unwrap_or(DEFAULT_ADDRESS);
        let address = parse_address(text).map_err(|cause| {
            Failure::usage(
                format!("{text:?} is not the address of a server"),
                cause,
                "Correct --server or GANTRY_SERVER.",
            )
        })?;
        Api::new(address, self.key()?)
    }

    /// The user that was named, if one was.
    pub(super) fn user(&self) -> Result<Option<UserId>, Failure> {
        let parse = |name: &str| {
            name.parse().map_err(|error: IdError| {
                Failure::usage(
                    format!("{name:?} is not a user's name"),
                    error.to_string(),
                    "Correct --user or GANTRY_USER.",
                )
            })
        };
        given(self.user.as_deref()).map(parse).transpose()
    }

    fn key(&self) -> Result<SecretString, Failure> {
        let (from, text) = match &self.key_file {
            Some(path) => (path.display().to_string(), read_key(path)?),
            None => (
                "API_KEY".to_owned(),
                std::env::var("API_KEY").unwrap_or_default(),
            ),
        };
        let key = text.trim();
        if key.is_empty() && self.key_file.is_none() {
            return Err(Failure::usage(
                "there is no key",
                "API_KEY is not set and --key-file is not given",
                "Set API_KEY or name a file with --key-file. The server prints an admin key at its first start; `gantry key create` makes more.",
            ));
        }
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Failure::usage(
                format!("{from} does not hold a key"),
                "a key is one word of visible ASCII characters",
                "Put the key there as it was printed, and nothing else.",
            ));
        }
        Ok(SecretString::from(key.to_owned()))
    }

    /// Who to act for.
    pub(super) async fn acting_user(&self, api: &Api) -> Result<UserId, Failure> {
        #[derive(Deserialize)]
        struct Session {
            user_id: Option<UserId>,
        }
        if let Some(user) = self.user()? {
            return Ok(user);
        }
        let session: Session = api.get("/session", &[]).await?;
        if let Some(user) = session.user_id {
            return Ok(user);
        }
        login_name().as_deref().and_then(user_from_login).ok_or_else(|| {
            Failure::usage(
                "which user is this for?",
                "the key is an admin's, which may act for anybody, and your login name is not known",
                "Name the user with --user or GANTRY_USER.",
            )
        })
    }
}

/// An empty variable is one that is not set: compose files pass them that way.
fn given(value: Option<&str>) -> Option<&str> {
    value.map(str::trim).filter(|value| !value.is_empty())
}

fn parse_address(text: &str) -> Result<Url, String> {
    let url: Url = text
        .parse()
        .map_err(|error| format!("{error}; expected an address such as http://127.0.0.1:8000"))?;
    match url.scheme() {
        "http" if url.has_host() => {}
        "https" => return Err("https is not spoken by this program; use http, through a tunnel where the network is not yours".to_owned()),
        _ => return Err("expected an address such as http://127.0.0.1:8000".to_owned()),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(
            "a name or password in the address is not used; the key is API_KEY or --key-file"
                .to_owned(),
        );
    }
    Ok(url)
}

fn read_key(path: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_KEY_BYTES).read_to_string(&mut text))
        .map_err(|error| collect::unreadable(path, &error))?;
    Ok(text)
}

/// `USER` and `LOGNAME` are not set everywhere (containers, cron): the account's own name is last.
fn login_name() -> Option<String> {
    let named = |variable| std::env::var(variable).ok().filter(|name| !name.is_empty());
    named("USER").or_else(|| named("LOGNAME")).or_else(|| {
        let accounts = fs::read_to_string("/etc/passwd").ok()?;
        let uid = rustix::process::getuid().as_raw().to_string();
        let account = accounts
            .lines()
            .find(|line| line.split(':').nth(2) == Some(&uid))?;
        account.split(':').next().map(str::to_owned)
    })
}

/// A login name as a DNS label: `Ada.Lovelace` → `ada-lovelace`.
fn user_from_login(login: &str) -> Option<UserId> {
    let mut label = String::new();
    for c in login.chars().map(|c| c.to_ascii_lowercase()) {
        match c {
            'a'..='z' | '0'..='9' => label.push(c),
            _ if !label.ends_with('-') => label.push('-'),
            _ => {}
        }
        if label.len() == MAX_LOGIN_LABEL {
            break;
        }
    }
    label.trim_matches('-').parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::client::failure::Exit;

    #[test]
    fn a_login_name_becomes_a_label_that_leaves_room_for_its_repl() {
        let label = |login| user_from_login(login).map(String::from);
        assert_eq!(label("Ada.Lovelace").unwrap(), "ada-lovelace");
        assert_eq!(label("_www__data_").unwrap(), "www-data");
        assert_eq!(label("jürgen").unwrap(), "j-rgen");
        assert_eq!(label("___"), None);
        assert_eq!(label(""), None);
        let long = user_from_login(&"x".repeat(80)).unwrap();
        assert!(long.default_repl().is_some());
    }

    #[test]
    fn addresses_that_cannot_work_are_refused_with_the_reason() {
        assert!(parse_address("http://127.0.0.1:8000").is_ok());
        assert!(
            parse_address("https://gantry.example")
                .unwrap_err()
                .contains("https")
        );
        for bad in ["", "127.0.0.1:8000", "ftp://x", "http://key@host/"] {
            assert!(parse_address(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_key_file_holds_one_word() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("key");
        let args = ServerArgs {
            server: None,
            key_file: Some(path.clone()),
            user: None,
        };
        assert_eq!(args.key().unwrap_err().exit, Exit::Usage);
        for (text, good) in [
            ("gtk_a_b_c\n", true),
            ("", false),
            ("two words", false),
            ("k\u{e9}y", false),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(args.key().is_ok(), good, "{text:?}");
        }
    }

    #[test]
    fn an_empty_variable_is_one_that_is_not_set() {
        let args = |text: &str| ServerArgs {
            server: Some(text.to_owned()),
            key_file: None,
            user: Some(text.to_owned()),
        };
        assert_eq!(args(" ").user().unwrap(), None);
        assert_eq!(args("ada").user().unwrap().unwrap().as_str(), "ada");
        assert_eq!(args("Ada").user().unwrap_err().exit, Exit::Usage);
        assert!(given(args("").server.as_deref()).is_none());
    }
}
