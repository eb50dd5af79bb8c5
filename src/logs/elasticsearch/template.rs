//! What Elasticsearch must know before the first record: fields and their types, and when old
//! indices go.

use serde_json::{Value, json};

use super::{CALL_TIMEOUT, Elasticsearch, ElasticsearchError, Method, Payload};

const TEMPLATE: &str = include_str!("template.json");

/// What the server can do beyond the plain index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::logs) struct Abilities {
    /// Index lifecycle management: old indices go by themselves.
    pub(in crate::logs) lifecycle: bool,
    /// Data streams: append-only indices that Kibana knows how to show.
    pub(in crate::logs) data_streams: bool,
}

/// Puts in place what is missing. What an operator changed stays: a template is replaced only by one
/// of a later version, a policy never.
pub(in crate::logs) async fn install(
    elastic: &Elasticsearch,
) -> Result<Abilities, ElasticsearchError> {
    // With a name: a server without data streams would take the path for an index of this name, and ask
    // for a right to it.
    let streams = format!("/_data_stream/{}*", elastic.logs());
    let abilities = Abilities {
        lifecycle: answers(elastic, "/_ilm/status").await?,
        data_streams: answers(elastic, &streams).await?,
    };
    // Template and policy are called alike.
    let name = elastic.logs().trim_end_matches('-').to_owned();
    let policy = format!("/_ilm/policy/{name}");
    if abilities.lifecycle && !answers(elastic, &policy).await? {
        put(elastic, &policy, policy_body()).await?;
    }
    install_template(elastic, &name, template_body(&name, abilities)?).await?;
    let journals = elastic.journals();
    install_template(elastic, &journals, journals_body(&journals)).await?;
    Ok(abilities)
}

/// Whether the templates are there: they go with the rest when a cluster is made anew.
pub(in crate::logs) async fn installed(
    elastic: &Elasticsearch,
) -> Result<bool, ElasticsearchError> {
    let (logs, journals) = (elastic.logs(), elastic.journals());
    let wanted = [logs.trim_end_matches('-'), journals.as_str()];
    let path = format!("/_index_template/{}-*", elastic.prefix());
    let query = [("filter_path", "index_templates.name")];
    let answer = elastic
        .send(Method::Get, &path, &query, Payload::None, CALL_TIMEOUT)
        .await?;
    if answer.status == 404 {
        return Ok(false);
    }
    let found = answer.json()?;
    let templates = found["index_templates"].as_array();
    let names = || templates.into_iter().flatten().map(|found| &found["name"]);
    Ok(wanted
        .iter()
        .all(|wanted| names().any(|name| name == wanted)))
}

/// Whether there is something at this path. A server without the feature answers 400 or 405, one that
/// has it but not the thing 404; a refused login is an error.
pub(in crate::logs) async fn answers(
    elastic: &Elasticsearch,
    path: &str,
) -> Result<bool, ElasticsearchError> {
    let answer = elastic
        .send(Method::Get, path, &[], Payload::None, CALL_TIMEOUT)
        .await?;
    match answer.status {
        200..=299 => Ok(true),
        400 | 404 | 405 => Ok(false),
        _ => Err(answer.error()),
    }
}

async fn install_template(
    elastic: &Elasticsearch,
    name: &str,
    body: Value,
) -> Result<(), ElasticsearchError> {
    let path = format!("/_index_template/{name}");
    let answer = elastic
        .send(Method::Get, &path, &[], Payload::None, CALL_TIMEOUT)
        .await?;
    let present = match answer.status {
        404 => None,
        _ => {
            let found = answer.json()?;
            let template = &found["index_templates"][0]["index_template"];
            Some(template["version"].as_u64().unwrap_or(0))
        }
    };
    if present >= Some(body["version"].as_u64().unwrap_or(0)) {
        return Ok(());
    }
    put(elastic, &path, body).await?;
    tracing::info!(template = name, "index template installed");
    Ok(())
}

async fn put(elastic: &Elasticsearch, path: &str, body: Value) -> Result<(), ElasticsearchError> {
    elastic
        .call(Method::Put, path, &[], Payload::Json(body), CALL_TIMEOUT)
        .await
        .map(|_| ())
}

/// The records' template, for what this server can do. A day stays one index also as a data stream,
/// because the policy rolls nothing over: only within one index is an id given once.
fn template_body(name: &str, abilities: Abilities) -> Result<Value, ElasticsearchError> {
    let mut body: Value =
        serde_json::from_str(TEMPLATE).map_err(|error| ElasticsearchError::Nonsense {
            cause: format!("the built-in template is damaged: {error}"),
        })?;
    body["index_patterns"] = json!([format!("{name}-*")]);
    if abilities.lifecycle {
        body["template"]["settings"]["index.lifecycle.name"] = name.into();
    }
    if abilities.data_streams {
        body["data_stream"] = json!({});
    }
    Ok(body)
}

/// Thirty days, as the embedded search keeps them.
fn policy_body() -> Value {
    json!({"policy": {
        "_meta": {"description": "Gantry's records of the last 30 days"},
        "phases": {
            "hot": {"actions": {}},
            "delete": {"min_age": "30d", "actions": {"delete": {}}},
        },
    }})
}

fn journals_body(name: &str) -> Value {
    json!({
        "index_patterns": [name],
        "priority": 300,
        "version": 1,
        "_meta": {"description": "How far each of Gantry's servers has shipped its records"},
        "template": {
            "settings": {"number_of_shards": 1, "auto_expand_replicas": "0-1"},
            "mappings": {
                "dynamic": false,
                "properties": {
                    "@timestamp": {"type": "date"},
                    "journal": {"type": "keyword"},
                    "position": {"type": "long"},
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_template_follows_what_the_server_can_do() {
        let none = Abilities {
            lifecycle: false,
            data_streams: false,
        };
        let plain = template_body("gantry-logs", none).unwrap();
        assert_eq!(plain["index_patterns"], json!(["gantry-logs-*"]));
        assert_eq!(plain["template"]["mappings"]["dynamic"], false);
        assert_eq!(plain.get("data_stream"), None);
        let settings = &plain["template"]["settings"];
        assert_eq!(settings.get("index.lifecycle.name"), None);
        let all = Abilities {
            lifecycle: true,
            data_streams: true,
        };
        let full = template_body("gantry-logs", all).unwrap();
        assert_eq!(full["data_stream"], json!({}));
        assert_eq!(
            full["template"]["settings"]["index.lifecycle.name"],
            "gantry-logs"
        );
        // A rollover would let an id be given twice.
        assert!(!policy_body().to_string().contains("rollover"));
    }
}
