//! What a server with security on must allow, no more and no less, and how it is known to be itself.
//! `tests/testbed/secured.py` starts one.

use serde_json::Value;

use super::super::elasticsearch::{CALL_TIMEOUT, Method, Payload, install};
use super::*;

/// Longest wait for a record: what is refused stays refused.
const PATIENCE: Duration = Duration::from_secs(4);

/// What README.md names, but for lifecycle policies: this distribution has none.
const CLUSTER: &[&str] = &["monitor", "manage_index_templates"];
const LOGS: &[&str] = &["create_doc", "auto_configure", "read", "maintenance"];
const JOURNALS: &[&str] = &["index", "auto_configure", "read"];
/// Another server, as it tells how far it is.
const OTHER: &str = "00000000000000aa";

#[derive(Clone)]
struct Rights {
    cluster: Vec<&'static str>,
    logs: Vec<&'static str>,
    journals: Vec<&'static str>,
}

impl Rights {
    fn all() -> Self {
        Self {
            cluster: CLUSTER.to_vec(),
            logs: LOGS.to_vec(),
            journals: JOURNALS.to_vec(),
        }
    }

    /// Every one of them left out in turn.
    fn each_less_one() -> Vec<(String, Self)> {
        let mut found = Vec::new();
        type Part = fn(&mut Rights) -> &mut Vec<&'static str>;
        let parts: [(&str, Part); 3] = [
            ("cluster", |rights| &mut rights.cluster),
            ("logs", |rights| &mut rights.logs),
            ("journals", |rights| &mut rights.journals),
        ];
        for (what, part) in parts {
            for index in 0..part(&mut Self::all()).len() {
                let mut rights = Self::all();
                let gone = part(&mut rights).remove(index);
                found.push((format!("{gone} on {what}"), rights));
            }
        }
        found
    }
}

fn client(variables: &[(&str, String)]) -> Elasticsearch {
    let settings = ElasticsearchSettings::from_variables(|name| {
        let own = variables.iter().find(|(known, _)| *known == name);
        own.map(|(_, value)| value.clone())
    });
    Elasticsearch::new(&settings.unwrap().unwrap()).unwrap()
}

fn given(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: run tests/testbed/secured.py"))
}

/// With all rights.
fn owner(prefix: &str) -> Elasticsearch {
    client(&[
        ("ELASTICSEARCH_HOST", given("ELASTICSEARCH_HOST")),
        ("ELASTICSEARCH_CA", given("ELASTICSEARCH_CA")),
        ("ELASTICSEARCH_INDEX_PREFIX", prefix.to_owned()),
    ])
}

fn without_login() -> String {
    let host = given("ELASTICSEARCH_HOST");
    let (scheme, rest) = host.split_once("://").unwrap();
    format!("{scheme}://{}", rest.split_once('@').unwrap().1)
}

/// With a key that has these rights alone.
async fn holder(prefix: &str, rights: &Rights) -> Elasticsearch {
    let role = json!({
        "cluster": rights.cluster,
        "indices": [
            {"names": [format!("{prefix}-logs-*")], "privileges": rights.logs},
            {"names": [format!("{prefix}-journals*")], "privileges": rights.journals},
        ],
    });
    let body = json!({"name": prefix, "role_descriptors": {"gantry": role}});
    let made: Value = owner(prefix)
        .call(
            Method::Post,
            "/_security/api_key",
            &[],
            Payload::Json(body),
            CALL_TIMEOUT,
        )
        .await
        .unwrap();
    client(&[
        ("ELASTICSEARCH_HOST", without_login()),
        ("ELASTICSEARCH_CA", given("ELASTICSEARCH_CA")),
        ("ELASTICSEARCH_INDEX_PREFIX", prefix.to_owned()),
        (
            "ELASTICSEARCH_API_KEY",
            made["encoded"].as_str().unwrap().to_owned(),
        ),
    ])
}

/// Everything a server asks of Elasticsearch; what does not go.
async fn works(prefix: &str, elastic: Elasticsearch) -> Result<(), String> {
    let dir = TempDir::new().unwrap();
    let journal = open_journal(&dir);
    let said = |error: ElasticsearchError| error.to_string();
    elastic.check().await.map_err(said)?;
    install(&elastic).await.map_err(said)?;
    let options = ShipperOptions::in_folder(dir.path().join("shipper"));
    let shipper = Shipper::open(journal.clone(), elastic.clone(), options).unwrap();
    let stop = CancellationToken::new();
    let task = tokio::spawn(shipper.clone().run(stop.clone()));
    let id = SubmissionId::new();
    let mut last = 0;
    for event in [
        received("ada", id),
        output("a word"),
        Event::Reply(Box::new(Outcome::new(Status::TestsPassed))),
    ] {
        let record = NewRecord {
            user_id: "ada".parse().unwrap(),
            submission_id: Some(id),
            repl_id: "ada-prod".parse().unwrap(),
            event,
        };
        last = journal.append(record).await.unwrap().position;
    }
    journal.durable(last).await.unwrap();
    let result = async {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while shipper.position() < last {
            if tokio::time::Instant::now() > deadline {
                return Err("nothing is shipped".to_owned());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let search = ElasticsearchSearch::new(elastic, journal.clone(), shipper.clone(), None);
        let words = LogQuery {
            q: Some("word".to_owned()),
            ..LogQuery::default()
        };
        let page = search
            .query(words)
            .await
            .map_err(|error| error.to_string())?;
        if page.records.len() != 1 {
            return Err("it is not found".to_owned());
        }
        // How far it has shipped is told the others a second later.
        let journals = format!("/{prefix}-journals/_doc/{}", journal.identity());
        loop {
            let owner = owner(prefix);
            let told = owner.send(Method::Get, &journals, &[], Payload::None, CALL_TIMEOUT);
            if told.await.unwrap().status == 200 {
                break;
            }
            if tokio::time::Instant::now() > deadline {
                return Err("other servers are not told".to_owned());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let other = json!({"@timestamp": "2026-01-31T12:00:00Z", "journal": OTHER, "position": 5});
        let path = format!("/{prefix}-journals/_doc/{OTHER}");
        let query = [("refresh", "true")];
        let put = owner(prefix);
        let put = put.call(
            Method::Put,
            &path,
            &query,
            Payload::Json(other),
            CALL_TIMEOUT,
        );
        put.await.unwrap();
        // What is known of others is asked for again after a second.
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        let page = search.query(LogQuery::default()).await;
        let next = page.map_err(|error| error.to_string())?.next.unwrap();
        match next.contains(OTHER) {
            true => Ok(()),
            false => Err("other servers are not seen".to_owned()),
        }
    };
    let result = result.await;
    stop.cancel();
    task.await.unwrap();
    result
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a secured Elasticsearch"]
async fn a_key_needs_the_rights_that_are_named_and_each_of_them() {
    let trial = async |rights: Rights| {
        let prefix = format!("test-{}", SubmissionId::new());
        let result = works(&prefix, holder(&prefix, &rights).await).await;
        owner(&prefix).remove_all().await;
        result
    };
    assert_eq!(trial(Rights::all()).await, Ok(()));
    let mut idle = Vec::new();
    for (without, rights) in Rights::each_less_one() {
        match trial(rights).await {
            Ok(()) => idle.push(without),
            Err(why) => assert!(!why.is_empty(), "{without}"),
        }
    }
    assert_eq!(idle, [] as [&str; 0], "it works without them");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a secured Elasticsearch"]
async fn name_and_password_do_as_well_and_wrong_ones_are_named() {
    let base = |password: &str| {
        client(&[
            ("ELASTICSEARCH_HOST", without_login()),
            ("ELASTICSEARCH_CA", given("ELASTICSEARCH_CA")),
            ("ELASTICSEARCH_USERNAME", "elastic".to_owned()),
            ("ELASTICSEARCH_PASSWORD", password.to_owned()),
        ])
    };
    let host = given("ELASTICSEARCH_HOST");
    let login = host.split_once("://").unwrap().1.split_once('@').unwrap().0;
    let password = login.split_once(':').unwrap().1;
    assert!(base(password).check().await.is_ok());
    let error = base("wrong").check().await.unwrap_err().to_string();
    assert!(error.contains("ELASTICSEARCH_API_KEY"), "{error}");
    assert!(!error.contains("wrong"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a secured Elasticsearch"]
async fn a_server_with_an_unknown_authority_is_not_talked_to() {
    let unknown = client(&[("ELASTICSEARCH_HOST", given("ELASTICSEARCH_HOST"))]);
    let error = unknown.check().await.unwrap_err().to_string();
    assert!(error.contains("ELASTICSEARCH_CA"), "{error}");
    // Positive control.
    assert!(owner("gantry").check().await.is_ok());
}
