//! Modules: a Python module served over gRPC from its own pod.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{FieldError, UserId};

/// Longest name of a module.
const MAX_NAME: usize = 100;

/// Longest part of a name that Kubernetes sees; the rest of 63 is for what is put around it.
const MAX_LABEL: usize = 40;

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
            replicas: self.replicas.map(replicas).transpose()?,
        })
    }
}

/// A number of replicas that a module may have.
pub fn replicas(number: u32) -> Result<u32, FieldError> {
    if (1..=MAX_MODULE_REPLICAS).contains(&number) {
        return Ok(number);
    }
    let reason = format!("is {number}; a module may have 1 to {MAX_MODULE_REPLICAS}");
    Err(FieldError::new("replicas", reason))
}

/// A module as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleSpec {
    /// Which.
    pub name: ModuleName,
    /// Packages to install; `None`: as before, or none.
    pub packages: Option<Vec<Package>>,
    /// How many pods; `None`: as before, or one.
    pub replicas: Option<u32>,
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
    /// Times one of them was started again.
    pub restarts: u32,
    /// What was installed for it.
    pub packages: Vec<Package>,
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
    fn a_wrong_field_is_named() {
        let name: ModuleName = "numpy".parse().unwrap();
        let refused = |body: &str| {
            let request: ModuleRequest = serde_json::from_str(body).unwrap();
            request.validate(name.clone()).unwrap_err().field
        };
        assert_eq!(refused(r#"{"packages":["a==1","b"]}"#), "packages[1]");
        assert_eq!(refused(r#"{"replicas":0}"#), "replicas");
        assert_eq!(refused(r#"{"replicas":17}"#), "replicas");
    }
}
