//! What programs and modules depend on: whether it is installed, and from where.

use std::time::Duration;

use clap::Args;

use super::{ConfigError, given, parse, switch, wrong};
use crate::model::{PackageIndex, Packages, Place, Registry, package_place};

/// Most seconds of an installation that an operator may allow: a slot is held for as long.
const MOST_SECONDS: u64 = 1_800;

/// Arguments about packages.
#[derive(Debug, Default, Args)]
pub struct PackageArgs {
    /// Install what a submission's own file names (requirements.txt, package.json, go.mod, Cargo.toml) and the
    /// packages that a module is created with, from the index that `PIP_INDEX_URL`, `npm_config_registry`, `GOPROXY` or `GANTRY_CARGO_INDEX` names, or else the usual one
    #[arg(long, env = "GANTRY_ALLOW_PACKAGES", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    allow_packages: Option<String>,
    /// Hosts beside the indexes' own that packages come from, as host or host:port separated by commas
    #[arg(long, env = "GANTRY_PACKAGE_HOSTS", value_name = "HOSTS")]
    package_hosts: Option<String>,
    /// Longest time of an installation [default: 180]
    #[arg(long, env = "GANTRY_INSTALL_SECONDS", value_name = "SECONDS")]
    install_seconds: Option<String>,
}

impl PackageArgs {
    /// What may be installed. `variable`: the environment, in which installers have names of their own for
    /// their index.
    pub fn checked(
        &self,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Packages, ConfigError> {
        let hosts = self.hosts()?;
        let own = Packages::python().and_then(|pip| {
            let registry = pip.registry;
            let mut index = index(registry, &variable(registry.variable)).ok()?;
            index.places.extend(hosts.iter().cloned());
            Some(index)
        });
        let mut packages = Packages {
            wall: self.wall()?,
            own,
            ..Packages::default()
        };
        if !switch("GANTRY_ALLOW_PACKAGES", &self.allow_packages)? {
            return Ok(packages);
        }
        for registry in Packages::registries() {
            let mut index = index(registry, &variable(registry.variable))?;
            index.places.extend(hosts.iter().cloned());
            packages.indexes.insert(registry.variable, index);
        }
        Ok(packages)
    }

    fn wall(&self) -> Result<Duration, ConfigError> {
        let expected = format!("seconds, from 1 to {MOST_SECONDS}");
        let seconds: Option<u64> =
            parse("GANTRY_INSTALL_SECONDS", &self.install_seconds, &expected)?;
        match seconds {
            None => Ok(Packages::WALL),
            Some(seconds) if (1..=MOST_SECONDS).contains(&seconds) => {
                Ok(Duration::from_secs(seconds))
            }
            Some(seconds) => Err(wrong(
                "GANTRY_INSTALL_SECONDS",
                &seconds.to_string(),
                expected,
            )),
        }
    }

    fn hosts(&self) -> Result<Vec<Place>, ConfigError> {
        let hosts = given(&self.package_hosts).unwrap_or_default().split(',');
        let hosts = hosts.map(str::trim).filter(|host| !host.is_empty());
        hosts
            .map(|host| {
                let expected =
                    "hosts such as files.example or files.example:8443, with commas between them";
                package_place(host, 443)
                    .ok_or_else(|| wrong("GANTRY_PACKAGE_HOSTS", host, expected))
            })
            .collect()
    }
}

fn index(registry: &'static Registry, named: &Option<String>) -> Result<PackageIndex, ConfigError> {
    PackageIndex::new(registry, given(named)).ok_or_else(|| {
        // It may have a password in it.
        wrong(
            registry.variable,
            "(not shown)",
            "one URL such as https://packages.example/simple, without a password: what is installed could read it",
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn args(allow: &str, hosts: &str, seconds: &str) -> PackageArgs {
        let some = |text: &str| Some(text.to_owned());
        PackageArgs {
            allow_packages: some(allow),
            package_hosts: some(hosts),
            install_seconds: some(seconds),
        }
    }

    #[test]
    fn nothing_is_installed_unless_the_operator_says_so() {
        let packages = args("", "", "").checked(|_| Some("no URL".to_owned()));
        assert_eq!(packages.unwrap(), Packages::default());
        // What Gantry itself needs for modules it may fetch.
        let packages = args("", "", "").checked(|_| None).unwrap();
        assert!(packages.indexes.is_empty());
        assert_eq!(packages.own.unwrap().url, "https://pypi.org/simple");
    }

    #[test]
    fn each_language_has_the_index_that_its_installers_variable_names() {
        let own = |name: &str| (name == "PIP_INDEX_URL").then(|| "http://own:81/simple".to_owned());
        let packages = args("true", "files:82, more", "9").checked(own).unwrap();
        assert_eq!(packages.wall, Duration::from_secs(9));
        assert_eq!(packages.indexes.len(), Packages::registries().count());
        let python = &packages.indexes["PIP_INDEX_URL"];
        let places: Vec<String> = python
            .places
            .iter()
            .map(|(host, port)| format!("{host}:{port}"))
            .collect();
        assert_eq!(places, ["files:82", "more:443", "own:81"]);
        let node = &packages.indexes["npm_config_registry"];
        assert_eq!(node.url, "https://registry.npmjs.org/");
    }

    #[test]
    fn a_bad_value_is_refused_and_a_password_is_not_repeated() {
        let secret = |_: &str| Some("https://me:hush@index/".to_owned());
        let refused = args("true", "", "").checked(secret).unwrap_err();
        assert!(!refused.to_string().contains("hush"), "{refused}");
        for (args, variable) in [
            (args("maybe", "", ""), "GANTRY_ALLOW_PACKAGES"),
            (args("true", "a b", ""), "GANTRY_PACKAGE_HOSTS"),
            (args("false", "a b", ""), "GANTRY_PACKAGE_HOSTS"),
            (args("true", "", "0"), "GANTRY_INSTALL_SECONDS"),
            (args("true", "", "soon"), "GANTRY_INSTALL_SECONDS"),
        ] {
            let refused = args.checked(|_| None).unwrap_err().to_string();
            assert!(refused.starts_with(variable), "{refused}");
        }
    }
}
