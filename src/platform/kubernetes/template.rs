//! The manifest template: parsed first, and words replaced afterwards, inside string values only. A
//! hostile name can so become a strange string, and never another field or another object.

use std::collections::BTreeMap;

use serde_json::Value;

use super::cluster::{Kind, Manifest};

/// The template that is built in.
pub const BUILT_IN: &str = include_str!("../../../infrastructure/service.yaml");

/// The word for the repl's id.
pub const SERVICE_NAME: &str = "service_name";

/// Every other word.
pub const WORDS: [&str; 9] = [
    "${GANTRY_NAMESPACE}",
    "${GANTRY_USER}",
    "${GANTRY_RUNNER_IMAGE}",
    "${GANTRY_BUCKET}",
    "${GANTRY_PREFIX}",
    "${GANTRY_HOST}",
    "${GANTRY_APP_HOST}",
    "${GANTRY_APP_SCHEME}",
    "${GANTRY_INGRESS_CLASS}",
];

/// A template that was read and makes sense.
#[derive(Debug, Clone)]
pub struct Template {
    documents: Vec<(Kind, Value)>,
    /// Kinds in it that Gantry does not apply.
    pub unsupported: Vec<String>,
}

impl Template {
    /// Reads a template; the error says what is wrong with it, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parsed: Vec<Value> = serde_saphyr::from_multiple(text)
            .map_err(|error| format!("it is not YAML: {error}"))?;
        let mut documents = Vec::new();
        let mut unsupported = Vec::new();
        for (index, document) in parsed.into_iter().enumerate() {
            if document.is_null() {
                continue;
            }
            let number = index + 1;
            let field = |path: &str| document.pointer(path).and_then(Value::as_str);
            let (Some(version), Some(kind)) = (field("/apiVersion"), field("/kind")) else {
                return Err(format!("document {number} has no apiVersion or no kind"));
            };
            let Some(known) = known(version, kind) else {
                unsupported.push(format!("{version} {kind}"));
                continue;
            };
            match field("/metadata/name") {
                Some(name) if name.contains(SERVICE_NAME) => {}
                Some(name) => {
                    return Err(format!(
                        "the {kind} in document {number} is named {name:?}; without {SERVICE_NAME} in it all repls would share it"
                    ));
                }
                None => {
                    return Err(format!(
                        "the {kind} in document {number} has no metadata.name"
                    ));
                }
            }
            check_words(&document)?;
            documents.push((known, document));
        }
        let deployments: Vec<&Value> = documents
            .iter()
            .filter(|(kind, _)| *kind == Kind::Deployment)
            .map(|(_, document)| document)
            .collect();
        let [deployment] = deployments[..] else {
            return Err(format!(
                "it has {} Deployments; exactly one is the release",
                deployments.len()
            ));
        };
        let containers = deployment.pointer("/spec/template/spec/containers");
        if containers
            .and_then(Value::as_array)
            .is_none_or(Vec::is_empty)
        {
            return Err("its Deployment has no containers".to_owned());
        }
        // Whatever refers to another object comes after it.
        documents.sort_by_key(|(kind, _)| *kind);
        Ok(Self {
            documents,
            unsupported,
        })
    }

    /// The manifests for these words.
    pub fn fill(&self, words: &BTreeMap<&'static str, String>) -> Vec<Manifest> {
        let manifest = |(kind, document): &(Kind, Value)| {
            let mut body = document.clone();
            replace(&mut body, words);
            Manifest::new(*kind, body)
        };
        self.documents.iter().map(manifest).collect()
    }
}

fn known(version: &str, kind: &str) -> Option<Kind> {
    [
        Kind::Service,
        Kind::StatefulSet,
        Kind::Deployment,
        Kind::Ingress,
    ]
    .into_iter()
    .find(|known| {
        let resource = known.resource();
        resource.kind == kind && resource.api_version == version
    })
}

/// A word that is not known would stand in the cluster as it is.
fn check_words(value: &Value) -> Result<(), String> {
    match value {
        Value::String(text) => {
            let unknown = text.match_indices("${GANTRY_").find_map(|(at, _)| {
                let rest = &text[at..];
                let word = &rest[..rest.find('}').map_or(rest.len(), |end| end + 1)];
                (!WORDS.contains(&word)).then(|| word.to_owned())
            });
            match unknown {
                Some(word) => Err(format!("{word} is not a word that Gantry knows")),
                None => Ok(()),
            }
        }
        Value::Array(items) => items.iter().try_for_each(check_words),
        Value::Object(fields) => fields.values().try_for_each(check_words),
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
    }
}

fn replace(value: &mut Value, words: &BTreeMap<&'static str, String>) {
    match value {
        Value::String(text) => *text = replaced(text, words),
        Value::Array(items) => items.iter_mut().for_each(|item| replace(item, words)),
        Value::Object(fields) => fields.values_mut().for_each(|field| replace(field, words)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// In one pass: what was put in is not looked at again.
fn replaced(text: &str, words: &BTreeMap<&'static str, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let next = words
            .iter()
            .filter_map(|(word, with)| Some((rest.find(word)?, *word, with)))
            .min_by_key(|(at, ..)| *at);
        let Some((at, word, with)) = next else {
            break;
        };
        out.push_str(&rest[..at]);
        out.push_str(with);
        rest = &rest[at + word.len()..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn words(name: &str) -> BTreeMap<&'static str, String> {
        BTreeMap::from([(SERVICE_NAME, name.to_owned())])
    }

    #[test]
    fn the_built_in_template_makes_a_service_a_deployment_and_an_ingress() {
        let template = Template::parse(BUILT_IN).unwrap();
        let kinds: Vec<Kind> = template.documents.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [Kind::Service, Kind::Deployment, Kind::Ingress]);
        assert!(template.unsupported.is_empty());
        let mut words = words("demo");
        for word in WORDS {
            words.insert(word, "x".to_owned());
        }
        let filled = format!("{:?}", template.fill(&words));
        assert!(
            !filled.contains("${") && !filled.contains(SERVICE_NAME),
            "{filled}"
        );
        let deployment = template.fill(&words).remove(1).body;
        serde_json::from_value::<k8s_openapi::api::apps::v1::Deployment>(deployment.clone())
            .unwrap();
        // An alias of the template is the text it stands for.
        let security = &deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"];
        assert_eq!(security["capabilities"]["drop"][0], "ALL");
    }

    #[test]
    fn the_examples_can_be_used_and_keep_what_is_theirs() {
        let aws_cli = include_str!("../../../infrastructure/examples/aws-cli.yaml");
        let by_account = include_str!("../../../infrastructure/examples/service-account.yaml");
        let mut words = words("shop");
        for word in WORDS {
            words.insert(word, "x".to_owned());
        }
        for text in [aws_cli, by_account] {
            let template = Template::parse(text).unwrap();
            assert!(template.unsupported.is_empty());
            let filled = template.fill(&words);
            let kinds: Vec<Kind> = filled.iter().map(|manifest| manifest.kind).collect();
            assert_eq!(kinds, [Kind::Service, Kind::Deployment, Kind::Ingress]);
            let text = format!("{filled:?}");
            assert!(
                !text.contains("${") && !text.contains(SERVICE_NAME),
                "{text}"
            );
            assert!(text.contains("amazon/aws-cli"));
        }
        let filled = Template::parse(aws_cli).unwrap().fill(&words);
        let init = &filled[1].body["spec"]["template"]["spec"]["initContainers"][0];
        let copy = "aws s3 cp s3://gantry-code/code/shop/ /workspace/ --recursive";
        assert_eq!(init["args"][0], copy);
        assert_eq!(
            filled[2].body["spec"]["rules"][0]["host"],
            "shop.terminals.example"
        );
    }

    #[test]
    fn what_is_wrong_with_a_template_is_said() {
        let wrong = |text: &str| Template::parse(text).unwrap_err();
        assert!(wrong("a: [").contains("not YAML"));
        assert!(wrong("a: 1").contains("apiVersion"));
        assert!(wrong("").contains("0 Deployments"));
        let one = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: fixed}\n";
        assert!(wrong(one).contains("would share it"));
        let unknown = BUILT_IN.replace("${GANTRY_HOST}", "x-${GANTRY_HOTS}");
        assert!(wrong(&unknown).contains("${GANTRY_HOTS}"));
        let two = BUILT_IN.replace("kind: Ingress", "kind: ConfigMap");
        assert_eq!(
            Template::parse(&two).unwrap().unsupported,
            ["networking.k8s.io/v1 ConfigMap"]
        );
    }

    #[test]
    fn a_word_that_was_put_in_is_not_replaced_again() {
        let mut words = words("${GANTRY_USER}");
        words.insert("${GANTRY_USER}", "service_name".to_owned());
        assert_eq!(
            replaced("a-service_name-${GANTRY_USER}", &words),
            "a-${GANTRY_USER}-service_name"
        );
    }

    proptest! {
        /// Whatever the name, the shape stays: the same documents, the same keys, the same lengths.
        #[test]
        fn no_name_adds_yaml(name in "\\PC*|[\\n:\\-{}\\[\\]\"'&*!|>% a]{0,60}") {
            fn shape(value: &Value) -> Value {
                match value {
                    Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), shape(v))).collect::<serde_json::Map<_, _>>().into(),
                    Value::Array(items) => items.iter().map(shape).collect::<Vec<_>>().into(),
                    Value::String(_) => "".into(),
                    other => other.clone(),
                }
            }
            let template = Template::parse(BUILT_IN).unwrap();
            let one = template.fill(&words(&name));
            let other = template.fill(&words("plain"));
            for (one, other) in one.iter().zip(&other) {
                prop_assert_eq!(shape(&one.body), shape(&other.body));
            }
        }
    }
}
