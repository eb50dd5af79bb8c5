//! What a repl runs with beside its code: replicas, variables and domains of its own.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::submission::check_env;
use super::{Domain, FieldError, Problem};

/// Most replicas of a repl. A user's share of the cluster usually ends before.
pub const MAX_REPL_REPLICAS: u32 = 20;

/// How many replicas of a repl run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Scale {
    /// As many as this.
    Fixed {
        /// How many.
        replicas: u32,
    },
    /// As many as their processor time asks for.
    Auto(Autoscale),
}

/// Replicas by processor time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Autoscale {
    /// At least so many.
    pub min: u32,
    /// At most so many.
    pub max: u32,
    /// Percent of the processor time that a replica requests, which the average is to come near.
    pub cpu_percent: u32,
}

impl Scale {
    /// The most replicas this comes to.
    pub fn most(self) -> u32 {
        match self {
            Scale::Fixed { replicas } => replicas,
            Scale::Auto(auto) => auto.max,
        }
    }

    /// How many replicas there are to be when there are `now`.
    pub fn replicas(self, now: Option<u32>) -> u32 {
        match self {
            Scale::Fixed { replicas } => replicas,
            Scale::Auto(auto) => now.unwrap_or(auto.min).clamp(auto.min, auto.max),
        }
    }
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scale::Fixed { replicas: 1 } => f.write_str("1 replica"),
            Scale::Fixed { replicas } => write!(f, "{replicas} replicas"),
            Scale::Auto(Autoscale {
                min,
                max,
                cpu_percent,
            }) => {
                write!(
                    f,
                    "{min} to {max} replicas at {cpu_percent} % of the processor time"
                )
            }
        }
    }
}

/// A scale as somebody asks for it: `replicas`, or the other three.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleRequest {
    /// A fixed number.
    pub replicas: Option<i64>,
    /// The least.
    pub min: Option<i64>,
    /// The most.
    pub max: Option<i64>,
    /// The share of the requested processor time.
    pub cpu_percent: Option<i64>,
}

impl ScaleRequest {
    /// Checks every field.
    pub fn checked(self) -> Result<Scale, FieldError> {
        let replicas = |field: &str, value: i64| {
            let fits = u32::try_from(value)
                .ok()
                .filter(|n| (1..=MAX_REPL_REPLICAS).contains(n));
            fits.ok_or_else(|| {
                let stop = if value == 0 {
                    "; POST /stop stops a repl"
                } else {
                    ""
                };
                FieldError::new(field, format!("must be 1 to {MAX_REPL_REPLICAS}{stop}"))
            })
        };
        match self {
            Self {
                replicas: Some(count),
                min: None,
                max: None,
                cpu_percent: None,
            } => {
                let replicas = replicas("replicas", count)?;
                Ok(Scale::Fixed { replicas })
            }
            Self {
                replicas: Some(_), ..
            } => Err(FieldError::new(
                "replicas",
                "cannot be given with min, max or cpu_percent",
            )),
            Self {
                replicas: None,
                min,
                max: Some(max),
                cpu_percent: Some(percent),
            } => {
                let (min, max) = (replicas("min", min.unwrap_or(1))?, replicas("max", max)?);
                if min > max {
                    return Err(FieldError::new(
                        "min",
                        format!("is more than max, which is {max}"),
                    ));
                }
                let percent = u32::try_from(percent)
                    .ok()
                    .filter(|p| (1..=1_000).contains(p));
                let cpu_percent =
                    percent.ok_or_else(|| FieldError::new("cpu_percent", "must be 1 to 1000"))?;
                Ok(Scale::Auto(Autoscale {
                    min,
                    max,
                    cpu_percent,
                }))
            }
            Self {
                replicas: None,
                min: None,
                max: None,
                cpu_percent: None,
            } => Err(FieldError::new(
                "replicas",
                "or max and cpu_percent are required",
            )),
            Self { max: None, .. } => Err(FieldError::new("max", "is required with cpu_percent")),
            Self {
                cpu_percent: None, ..
            } => Err(FieldError::new("cpu_percent", "is required with max")),
        }
    }
}

/// A value that is never shown again.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct SecretText(String);

impl SecretText {
    /// The value, for the one who needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for SecretText {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText")
    }
}

/// A repl's own variables. A release's own, which came with its submission, go before them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Variables {
    /// Those that are shown.
    pub env: BTreeMap<String, String>,
    /// Those that are not.
    pub secrets: BTreeMap<String, SecretText>,
}

impl Variables {
    /// Names and values of both kinds.
    pub fn all(&self) -> impl Iterator<Item = (&String, &str)> {
        let env = self.env.iter().map(|(name, value)| (name, value.as_str()));
        env.chain(
            self.secrets
                .iter()
                .map(|(name, value)| (name, value.expose())),
        )
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.env.is_empty() && self.secrets.is_empty()
    }
}

/// Variables as somebody sends them. What is left out stays as it is; what is given takes the place of
/// all of its kind. A secret that is null keeps its value.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariablesChange {
    /// Those that are shown.
    pub env: Option<BTreeMap<String, String>>,
    /// Those that are not.
    pub secrets: Option<BTreeMap<String, Option<SecretText>>>,
}

impl VariablesChange {
    /// What the variables are after it. The error names what is wrong with it.
    pub fn applied_to(&self, before: &Variables) -> Result<Variables, FieldError> {
        let env = self.env.as_ref().unwrap_or(&before.env).clone();
        let secrets = match &self.secrets {
            None => before.secrets.clone(),
            Some(secrets) => secrets
                .iter()
                .map(|(name, value)| {
                    let value = value.as_ref().or_else(|| before.secrets.get(name));
                    let value = value.ok_or_else(|| {
                        FieldError::new(
                            format!("secrets.{}", shown(name)),
                            "is null and has no value to keep; give it one",
                        )
                    })?;
                    Ok((name.clone(), value.clone()))
                })
                .collect::<Result<_, FieldError>>()?,
        };
        let after = Variables { env, secrets };
        check(&after)?;
        Ok(after)
    }
}

fn check(variables: &Variables) -> Result<(), FieldError> {
    if let Some(name) = variables
        .env
        .keys()
        .find(|name| variables.secrets.contains_key(*name))
    {
        return Err(FieldError::new(format!("secrets.{name}"), "is in env, too"));
    }
    let ours = |name: &&String| *name == "PORT" || name.starts_with("GANTRY_");
    if let Some((name, _)) = variables.all().find(|(name, _)| ours(name)) {
        return Err(FieldError::new(
            "env",
            format!("{} is set by Gantry itself", shown(name)),
        ));
    }
    let all = variables
        .all()
        .map(|(name, value)| (name.clone(), value.to_owned()));
    check_env(&all.collect())
}

fn shown(name: &str) -> String {
    name.chars().take(40).collect()
}

/// What a repl runs with, as it is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplSettings {
    /// Its replicas, when somebody has said how many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
    /// Its variables that are shown.
    pub env: BTreeMap<String, String>,
    /// The names of its secrets.
    pub secrets: Vec<String>,
    /// Host names of its own, proved to be its user's.
    #[serde(default)]
    pub domains: Vec<Domain>,
}

impl ReplSettings {
    /// Settings with these variables.
    pub fn new(scale: Option<Scale>, variables: &Variables, domains: &[Domain]) -> Self {
        Self {
            scale,
            domains: domains.to_vec(),
            env: variables.env.clone(),
            secrets: variables.secrets.keys().cloned().collect(),
        }
    }
}

/// A change of what a repl runs with.
#[derive(Debug, Clone)]
pub enum ReplChange {
    /// Of its replicas.
    Scale(Scale),
    /// Of its variables.
    Variables(VariablesChange),
    /// Of its domains, which were proved.
    Domains(Vec<Domain>),
}

/// Why a workspace does not get more replicas: what is edited in one of them is not in the others.
pub fn workspace_not_scaled() -> Problem {
    Problem::new(
        "workspace_not_scaled",
        "The repl was not scaled",
        "it runs its current files, which are edited in one place",
        "Submit it: a release can have several replicas.",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn scale(body: Value) -> Result<Scale, String> {
        let request: ScaleRequest = serde_json::from_value(body).map_err(|e| e.to_string())?;
        request.checked().map_err(|error| error.to_string())
    }

    #[test]
    fn a_scale_is_a_number_or_a_range_with_a_share() {
        assert_eq!(
            scale(json!({ "replicas": 3 })),
            Ok(Scale::Fixed { replicas: 3 })
        );
        let auto = Autoscale {
            min: 1,
            max: 5,
            cpu_percent: 70,
        };
        let whole = json!({ "min": 1, "max": 5, "cpu_percent": 70 });
        assert_eq!(scale(whole), Ok(Scale::Auto(auto)));
        assert_eq!(
            scale(json!({ "max": 5, "cpu_percent": 70 })),
            Ok(Scale::Auto(auto))
        );
        for (bad, says) in [
            (json!({}), "replicas"),
            (json!({ "replicas": 0 }), "/stop"),
            (json!({ "replicas": -1 }), "1 to 20"),
            (json!({ "replicas": 21 }), "1 to 20"),
            (json!({ "replicas": 1, "max": 2 }), "cannot be given with"),
            (json!({ "min": 1 }), "max"),
            (json!({ "max": 2 }), "cpu_percent"),
            (json!({ "cpu_percent": 2 }), "max"),
            (
                json!({ "min": 3, "max": 2, "cpu_percent": 50 }),
                "more than max",
            ),
            (json!({ "min": 1, "max": 2, "cpu_percent": 0 }), "1 to 1000"),
            (json!({ "replicas": 1, "more": 1 }), "more"),
        ] {
            let told = scale(bad.clone()).unwrap_err();
            assert!(told.contains(says), "{bad}: {told}");
        }
    }

    #[test]
    fn an_autoscaled_release_keeps_the_replicas_it_has() {
        let auto = Scale::Auto(Autoscale {
            min: 2,
            max: 5,
            cpu_percent: 70,
        });
        let of = |now| auto.replicas(now);
        assert_eq!(
            (of(None), of(Some(4)), of(Some(9)), of(Some(0))),
            (2, 4, 5, 2)
        );
    }

    fn change(body: Value) -> VariablesChange {
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn a_secret_is_kept_by_null_and_never_printed() {
        let first = change(json!({ "env": { "A": "1" }, "secrets": { "S": "hush" } }));
        let first = first.applied_to(&Variables::default()).unwrap();
        let kept = change(json!({ "secrets": { "S": null, "T": "shh" } }));
        let second = kept.applied_to(&first).unwrap();
        assert_eq!(second.env, first.env, "what is left out stays");
        let all: BTreeMap<_, _> = second.all().collect();
        assert_eq!(all[&"S".to_owned()], "hush");
        let third = change(json!({ "env": {}, "secrets": {} }))
            .applied_to(&second)
            .unwrap();
        assert!(third.is_empty());
        let told = format!("{first:?}{second:?}{kept:?}");
        let settings = serde_json::to_string(&ReplSettings::new(None, &second, &[])).unwrap();
        assert!(!told.contains("hush") && !told.contains("shh"), "{told}");
        assert!(!settings.contains("hush") && settings.contains(r#""secrets":["S","T"]"#));
    }

    #[test]
    fn wrong_variables_are_named_and_nothing_is_changed() {
        for (bad, says) in [
            (json!({ "secrets": { "S": null } }), "secrets.S"),
            (
                json!({ "env": { "A": "" }, "secrets": { "A": "" } }),
                "is in env, too",
            ),
            (json!({ "env": { "PORT": "1" } }), "PORT is set by Gantry"),
            (
                json!({ "secrets": { "GANTRY_RUNNER_KEY": "x" } }),
                "set by Gantry",
            ),
            (json!({ "env": { "A=B": "" } }), "is not a variable name"),
            (json!({ "env": { "A": "\0" } }), "NUL"),
            (json!({ "secrets": { "A": "x".repeat(1 << 20) } }), "bytes"),
        ] {
            let told = change(bad.clone())
                .applied_to(&Variables::default())
                .unwrap_err();
            assert!(told.to_string().contains(says), "{bad}: {told}");
        }
    }
}
