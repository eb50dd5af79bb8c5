//! Modules: a Python module served over gRPC from its own pod.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Autoscale, FieldError, Scale, ScaleRequest, UserId};

/// Longest name of a module.
const MAX_NAME: usize = 100;

/// Longest part of a name that Kubernetes sees; the rest of 63 is for what is put around it.
const MAX_LABEL: usize = 40;

/// Longest part of a name that its host shows, and bytes of the sum behind it: together 52 to 63 characters,
/// where a repl's name has at most 50.
const MAX_HOST_NAME: usize = 12;
const HOST_SUM: usize = 25;

/// Most packages of one module, and the longest name with its version.
const MAX_PACKAGES: usize = 20;
const MAX_PACKAGE: usize = 200;

/// Most replicas of a module: each has an interpreter, and the module in memory.
pub const MAX_MODULE_REPLICAS: u32 = 16;

/// The name of a Python module, such as `numpy` or `xml.etree`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModuleName(String);

/// Why a text is not a module's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not the name of a module: letters, digits and '_', not starting with a digit or '_', parts joined by '.', at most {MAX_NAME} characters"
)]
pub struct ModuleNameError(String);

impl ModuleName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The package it comes from: what stands before the first dot.
    pub fn top(&self) -> &str {
        self.0.split('.').next().unwrap_or(&self.0)
    }

    /// The name as a DNS label. Two names never have the same: what a label cannot hold is told apart
    /// by a checksum.
    pub fn label(&self) -> String {
        let fits = self.0.len() <= MAX_LABEL
            && self
                .0
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if fits {
            return self.0.clone();
        }
        let plain: String = self
            .0
            .chars()
            .map(|c| match c.to_ascii_lowercase() {
                c if c.is_ascii_alphanumeric() => c,
                _ => '-',
            })
            .take(MAX_LABEL - 9)
            .collect();
        format!(
            "{}-{:08x}",
            plain.trim_end_matches('-'),
            crc32fast::hash(self.0.as_bytes())
        )
    }

    /// The label of the module's host below the domain of programs. Another user's module has another, and no repl
    /// has it: it is longer than a repl's name may be.
    pub fn host_label(&self, user: &UserId) -> String {
        let sum = Sha256::digest(format!("{user}/{}", self.0));
        let sum: String = sum
            .iter()
            .take(HOST_SUM)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let name: String = self.label().chars().take(MAX_HOST_NAME).collect();
        format!("{}-{sum}", name.trim_end_matches('-'))
    }
}

impl FromStr for ModuleName {
    type Err = ModuleNameError;
    fn from_str(text: &str) -> Result<Self, ModuleNameError> {
        let part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphabetic())
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        };
        if text.len() <= MAX_NAME && text.split('.').all(part) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ModuleNameError(text.chars().take(120).collect()))
        }
    }
}

impl TryFrom<String> for ModuleName {
    type Error = ModuleNameError;
    fn try_from(text: String) -> Result<Self, ModuleNameError> {
        text.parse()
    }
}

impl From<ModuleName> for String {
    fn from(name: ModuleName) -> String {
        name.0
    }
}

impl fmt::Display for ModuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A package and its version, `name==version`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Package(String);

impl Package {
    /// As the installer takes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// With its name in the one form that indexes compare (PEP 503): `Flask_Login` and `flask-login` are one package.
    pub fn normalised(&self) -> String {
        let (name, version) = self.0.split_once("==").unwrap_or((&self.0, ""));
        let words = name.split(['-', '_', '.']).filter(|word| !word.is_empty());
        let words: Vec<String> = words.map(str::to_ascii_lowercase).collect();
        format!("{}=={version}", words.join("-"))
    }

    /// These in the form and order that is the same for whatever installs the same.
    pub fn set(packages: &[Package]) -> Vec<String> {
        let set: BTreeSet<String> = packages.iter().map(Package::normalised).collect();
        set.into_iter().collect()
    }

    /// A name for a set of them that no other set has, and `more`: what else decides what is installed.
    pub fn set_name(set: &[String], more: &[&str]) -> String {
        let mut digest = Sha256::new();
        let parts = more.iter().copied().chain(set.iter().map(String::as_str));
        for part in parts {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        digest
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

impl TryFrom<String> for Package {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let word = |text: &str, more: &str| {
            text.starts_with(|c: char| c.is_ascii_alphanumeric())
                && text
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        let fits = text.len() <= MAX_PACKAGE
            && text
                .split_once("==")
                .is_some_and(|(name, version)| word(name, "-_.") && word(version, ".!+-_"));
        if fits {
            return Ok(Self(text));
        }
        let shown: String = text.chars().take(80).collect();
        Err(format!(
            "{shown:?} is not a package with its version, such as \"requests==2.32.3\""
        ))
    }
}

impl From<Package> for String {
    fn from(package: Package) -> String {
        package.0
    }
}

/// What `POST /create_pod/{module}` takes, unchecked.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleRequest {
    /// Installed beside what the image has; left out: what the module has already.
    pub packages: Option<Vec<String>>,
    /// How many pods; left out: as many as there are, or one.
    pub replicas: Option<u32>,
}

impl ModuleRequest {
    /// Checks every field; the first wrong one is named.
    pub fn validate(self, name: ModuleName) -> Result<ModuleSpec, FieldError> {
        let packages = self.packages.map(|packages| {
            if packages.len() > MAX_PACKAGES {
                let reason = format!("may hold {MAX_PACKAGES} packages");
                return Err(FieldError::new("packages", reason));
            }
            let checked = packages.into_iter().enumerate().map(|(index, text)| {
                Package::try_from(text)
                    .map_err(|why| FieldError::new(format!("packages[{index}]"), why))
            });
            checked.collect()
        });
        Ok(ModuleSpec {
            name,
            packages: packages.transpose()?,
            scale: self.replicas.map(replicas).transpose()?,
        })
    }
}

/// A number of replicas that a module may have.
fn replicas(number: u32) -> Result<Scale, FieldError> {
    if (1..=MAX_MODULE_REPLICAS).contains(&number) {
        return Ok(Scale::Fixed { replicas: number });
    }
    let reason = format!("is {number}; a module may have 1 to {MAX_MODULE_REPLICAS}");
    Err(FieldError::new("replicas", reason))
}

/// A scale that a module may have.
pub fn scale(request: ScaleRequest) -> Result<Scale, FieldError> {
    let alone = request.min.is_none() && request.max.is_none() && request.cpu_percent.is_none();
    if let (Some(number), true) = (request.replicas, alone) {
        return replicas(u32::try_from(number).unwrap_or(0));
    }
    let scale = request.checked()?;
    if scale.most() > MAX_MODULE_REPLICAS {
        let reason = format!(
            "is {}; a module may have 1 to {MAX_MODULE_REPLICAS}",
            scale.most()
        );
        return Err(FieldError::new("max", reason));
    }
    Ok(scale)
}

/// A module as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleSpec {
    /// Which.
    pub name: ModuleName,
    /// Packages to install; `None`: as before, or none.
    pub packages: Option<Vec<Package>>,
    /// How many pods; `None`: as before, or one.
    pub scale: Option<Scale>,
}

/// What a module is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModuleState {
    /// Its pods come up.
    Starting,
    /// At least one of its pods answers.
    Running,
    /// None does, and the cause says why.
    Failed,
    /// Nobody called it for long; the next call starts it again.
    Stopped,
}

/// A module and how it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleStatus {
    /// Which.
    pub module: ModuleName,
    /// Whose.
    pub user_id: UserId,
    /// Where everything of its user's is.
    pub namespace: String,
    /// What it is doing.
    pub state: ModuleState,
    /// Why, when it is not as it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// Pods that answer.
    pub ready: u32,
    /// Pods that are wanted.
    pub replicas: u32,
    /// How their number follows the processor time they take, when it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<Autoscale>,
    /// Times one of them was started again.
    pub restarts: u32,
    /// The host at which gRPC clients reach it without this server, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// What was installed for it.
    pub packages: Vec<Package>,
    /// When it was last called, where that is noted and nearly so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used: Option<Timestamp>,
    /// Since when it has been there.
    pub since: Timestamp,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_module_is_named_as_python_does_and_never_privately() {
        for good in ["numpy", "xml.etree", "PIL", "a1_b"] {
            assert!(good.parse::<ModuleName>().is_ok(), "{good}");
        }
        let long = "x".repeat(101);
        for bad in [
            "", "_x", "a._b", "1a", "a-b", "a..b", ".a", "a.", "é", "a b", "a\n", &long,
        ] {
            assert!(bad.parse::<ModuleName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_are_dns_labels_and_no_two_names_share_one() {
        let label = |text: &str| text.parse::<ModuleName>().unwrap().label();
        assert_eq!(label("numpy"), "numpy");
        let all = ["a_b", "a.b", "A_b", "ab", "a__b"].map(label);
        for one in &all {
            assert!(one.parse::<UserId>().is_ok(), "{one}");
        }
        let different: std::collections::BTreeSet<&String> = all.iter().collect();
        assert_eq!(different.len(), all.len(), "{all:?}");
        assert!(label(&format!("{}_", "x".repeat(90))).len() <= MAX_LABEL);
    }

    #[test]
    fn a_host_is_one_users_modules_and_never_a_repls() {
        let host = |module: &str, user: &str| {
            let module: ModuleName = module.parse().unwrap();
            module.host_label(&user.parse().unwrap())
        };
        let long = "x".repeat(100);
        let all = [
            host("numpy", "ann"),
            host("numpy", "ann-b"),
            host("numpy", "bob"),
            host("num_py", "ann"),
            host("x", "ann"),
            host(&long, &"y".repeat(50)),
            host(&long[1..], "ann"),
        ];
        for one in &all {
            assert!(crate::model::is_host_label(one), "{one}");
            assert!(one.parse::<crate::model::ReplId>().is_err(), "{one}");
        }
        let different: std::collections::BTreeSet<&String> = all.iter().collect();
        assert_eq!(different.len(), all.len(), "{all:?}");
        assert_eq!(all[0], host("numpy", "ann"));
        assert!(all[0].starts_with("numpy-"));
    }

    #[test]
    fn packages_are_pinned_and_nothing_else() {
        let package = |text: &str| Package::try_from(text.to_owned());
        for good in ["numpy==2.3.5", "a-b_c.d==1!2.0+local-1", "X==1"] {
            assert!(package(good).is_ok(), "{good}");
        }
        for bad in [
            "numpy",
            "numpy>=1",
            "numpy==",
            "==1",
            "--index-url==x",
            "a b==1",
            "a==1 --pre",
            "./x==1",
            "git+https://x==1",
            "a==1;os_name",
            "a==-1",
        ] {
            assert!(package(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sets_are_named_by_what_they_are_and_not_by_how_they_are_written() {
        let named = |packages: &[&str]| {
            let packages: Result<Vec<Package>, String> = packages
                .iter()
                .map(|one| Package::try_from((*one).to_owned()))
                .collect();
            Package::set_name(&Package::set(&packages.unwrap()), &["python"])
        };
        let one = named(&["Flask_Login==1.0", "a.b==2"]);
        assert_eq!(one, named(&["a-b==2", "flask--login==1.0", "A_B==2"]));
        assert_eq!(one.len(), 64);
        for other in [
            &["flask-login==1.0"][..],
            &["flask-login==1.0.0", "a-b==2"],
            &["flask-login==1.0", "a-b==2", "c==1"],
            &[],
        ] {
            assert_ne!(one, named(other));
        }
        assert_ne!(
            Package::set_name(&[], &["a", "b"]),
            Package::set_name(&[], &["ab"])
        );
    }

    #[test]
    fn a_wrong_field_is_named() {
        let name: ModuleName = "numpy".parse().unwrap();
        let refused = |body: &str| {
            let request: ModuleRequest = serde_json::from_str(body).unwrap();
            request.validate(name.clone()).unwrap_err().field
        };
        assert_eq!(refused(r#"{"packages":["a==1","b"]}"#), "packages[1]");
        assert_eq!(refused(r#"{"replicas":0}"#), "replicas");
        assert_eq!(refused(r#"{"replicas":17}"#), "replicas");
        let scaled = |body: &str| {
            let request: ScaleRequest = serde_json::from_str(body).unwrap();
            scale(request).map_err(|error| error.field)
        };
        assert_eq!(scaled(r#"{"replicas":16}"#).unwrap().most(), 16);
        assert_eq!(scaled(r#"{"max":4,"cpu_percent":70}"#).unwrap().most(), 4);
        for (body, field) in [
            (r#"{"replicas":0}"#, "replicas"),
            (r#"{"replicas":-1}"#, "replicas"),
            (r#"{"max":17,"cpu_percent":70}"#, "max"),
            (r#"{"max":2}"#, "cpu_percent"),
            ("{}", "replicas"),
        ] {
            assert_eq!(scaled(body).unwrap_err(), field, "{body}");
        }
    }
}
