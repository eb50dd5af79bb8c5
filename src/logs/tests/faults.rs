//! Whatever happens on the way, every record is in the index, and once.

use std::net::SocketAddr;
use std::time::Instant;

use super::scripted::{Fault, Scripted, Search, Seen};
use super::*;

/// Longest wait for everything to be shipped: a dozen pauses of the shipper on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A journal that is shipped to a scripted server.
struct Yard {
    dir: TempDir,
    journal: Journal,
    server: Scripted,
    address: SocketAddr,
}

impl Yard {
    async fn new() -> Self {
        let server = Scripted::default();
        let address = server.serve("127.0.0.1:0".parse().unwrap()).await;
        let dir = TempDir::new().unwrap();
        Self {
            journal: open_journal(&dir),
            dir,
            server,
            address,
        }
    }

    fn elastic(&self, variables: &[(&str, &str)]) -> Elasticsearch {
        let settings = ElasticsearchSettings::from_variables(|name| match name {
            "ELASTICSEARCH_HOST" => Some(format!("http://{}", self.address)),
            _ => variables
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| (*value).to_owned()),
        });
        Elasticsearch::new(&settings.unwrap().unwrap()).unwrap()
    }

    fn shipper(&self) -> Shipper {
        let options = ShipperOptions {
            batch_bytes: 4 << 10,
            batch_age: Duration::from_millis(5),
            ..ShipperOptions::in_folder(self.dir.path().join("shipper"))
        };
        Shipper::open(self.journal.clone(), self.elastic(&[]), options).unwrap()
    }

    /// Records with these texts; the last one's position.
    async fn fill(&self, texts: impl IntoIterator<Item = String>) -> u64 {
        let id = SubmissionId::new();
        let mut last = 0;
        let mut events = vec![received("ada", id)];
        events.extend(texts.into_iter().map(|text| output(&text)));
        events.push(Event::Reply(Box::new(Outcome::new(Status::TestsPassed))));
        for event in events {
            let record = NewRecord {
                user_id: "ada".parse().unwrap(),
                submission_id: Some(id),
                repl_id: "ada-prod".parse().unwrap(),
                event,
            };
            last = self.journal.append(record).await.unwrap().position;
        }
        self.journal.durable(last).await.unwrap();
        last
    }

    /// Ships until everything up to there arrived, and what is shipped then.
    async fn ship_up_to(&self, position: u64) {
        let (shipper, stop) = (self.shipper(), CancellationToken::new());
        let task = tokio::spawn(shipper.clone().run(stop.clone()));
        until(|| shipper.position() >= position).await;
        stop.cancel();
        task.await.unwrap();
    }

    /// Every record of the journal is there under its own id, and nothing else.
    async fn assert_all_there_once(&self) {
        let mut expected: Vec<u64> = self
            .journal
            .read_from(0, usize::MAX)
            .await
            .unwrap()
            .iter()
            .map(|record| record.position)
            .collect();
        let mut found: Vec<u64> = self.server.with(|seen| {
            let documents = seen.documents.values();
            documents
                .map(|(_, document)| document["gantry.position"].as_u64().unwrap())
                .collect()
        });
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected);
    }

    fn dead_letters(&self) -> Vec<serde_json::Value> {
        let path = self.dir.path().join("shipper/dead-letters.ndjson");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

async fn until(mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < deadline, "not in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn lines(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|n| format!("line {n}"))
}

const FAULTS: [Fault; 8] = [
    Fault::BusyForSome,
    Fault::Busy,
    Fault::FailsAfterTaking,
    Fault::CutAfterTaking,
    Fault::Cut,
    Fault::Nonsense,
    Fault::Forbidden,
    Fault::Blocked,
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_fault_loses_or_doubles_a_record() {
    for fault in FAULTS {
        let yard = Yard::new().await;
        yard.server.with(|seen| {
            seen.faults = [Fault::None, fault, fault, Fault::None, fault]
                .into_iter()
                .collect();
        });
        let last = yard.fill(lines(200)).await;
        yard.ship_up_to(last).await;
        yard.assert_all_there_once().await;
        assert!(yard.dead_letters().is_empty(), "{fault:?}");
        let (left, bulks) = yard.server.with(|seen| (seen.faults.len(), seen.bulks));
        assert!(left == 0 && bulks >= 5, "{fault:?} was not met");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_record_goes_to_the_dead_letters_and_a_stand_in_takes_its_place() {
    let yard = Yard::new().await;
    let texts = lines(20).chain(["refuse me".to_owned()]).chain(lines(20));
    let last = yard.fill(texts).await;
    yard.ship_up_to(last).await;
    yard.assert_all_there_once().await;
    let letters = yard.dead_letters();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0]["record"]["message"], "refuse me");
    assert_eq!(letters[0]["type"], "document_parsing_exception");
    let id = letters[0]["id"].as_str().unwrap();
    let stand_in = yard.server.with(|seen| seen.documents[id].1.clone());
    assert_eq!(stand_in["error.type"], "document_parsing_exception");
    assert_eq!(stand_in["user.id"], "ada");
    assert_ne!(stand_in["message"], "refuse me");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_large_is_divided_and_one_record_alone_put_aside() {
    let yard = Yard::new().await;
    yard.server.with(|seen| seen.most_bytes = Some(2_000));
    let texts = lines(50).chain(["x".repeat(5_000)]).chain(lines(50));
    let last = yard.fill(texts).await;
    yard.ship_up_to(last).await;
    yard.assert_all_there_once().await;
    let letters = yard.dead_letters();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0]["type"], "content_too_large");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shipper_that_dies_at_any_time_is_followed_by_one_that_doubles_nothing() {
    let yard = Yard::new().await;
    let mut last = 0;
    for round in 0..25 {
        last = yard.fill(lines(60)).await;
        // Answers that are lost with the one who waits for them.
        yard.server.with(|seen| {
            seen.faults.push_back(FAULTS[round % FAULTS.len()]);
        });
        let task = tokio::spawn(yard.shipper().run(CancellationToken::new()));
        tokio::time::sleep(Duration::from_millis(3 * round as u64)).await;
        task.abort();
        let _ = task.await;
    }
    yard.ship_up_to(last).await;
    yard.assert_all_there_once().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_it_is_away_nothing_waits_and_followers_see_what_happens() {
    let mut yard = Yard::new().await;
    // An address at which nobody listens.
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    yard.address = gone.local_addr().unwrap();
    drop(gone);
    let (shipper, stop) = (yard.shipper(), CancellationToken::new());
    let task = tokio::spawn(shipper.clone().run(stop.clone()));
    let elastic = yard.elastic(&[]);
    let search = ElasticsearchSearch::new(elastic, yard.journal.clone(), shipper.clone(), None);
    let mut live = search.follow(LogQuery {
        q: Some("line".to_owned()),
        ..LogQuery::default()
    });
    let first = tokio::spawn(async move { (live.next().await.unwrap().unwrap(), live) });
    // It has begun when it was refused.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let last = yard.fill(lines(300)).await;
    let (first, live) = tokio::time::timeout(PATIENCE, first)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(messages(std::slice::from_ref(&first)), ["line 0"]);
    drop(live);
    // From there on, still from the journal.
    let again = search.follow(LogQuery {
        after: Some(first.cursor),
        ..LogQuery::default()
    });
    let next: Vec<_> = again.take(2).map(|record| record.unwrap()).collect().await;
    assert_eq!(messages(&next), ["line 1", "line 2"]);
    let error = search.query(LogQuery::default()).await.unwrap_err();
    assert!(matches!(error, SearchError::Elasticsearch(_)), "{error}");
    assert!(error.to_string().contains("ELASTICSEARCH_HOST"), "{error}");
    assert_eq!(shipper.position(), 0);
    yard.server.serve(yard.address).await;
    until(|| shipper.position() >= last).await;
    yard.assert_all_there_once().await;
    stop.cancel();
    task.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn templates_come_first_and_follow_what_the_server_can_do() {
    let template = "_index_template/gantry-logs";
    let shipped = |prepare: fn(&mut Seen)| async move {
        let yard = Yard::new().await;
        yard.server.with(prepare);
        let last = yard.fill(lines(3)).await;
        yard.ship_up_to(last).await;
        yard.server.with(|seen| std::mem::take(&mut seen.put))
    };
    let plain = shipped(|_| {}).await;
    assert_eq!(plain[template].get("data_stream"), None);
    assert!(plain.contains_key("_index_template/gantry-journals"));
    assert_eq!(plain.len(), 2);
    let full = shipped(|seen| seen.full = true).await;
    assert!(full[template]["data_stream"].is_object());
    assert!(full["_ilm/policy/gantry-logs"]["policy"]["phases"]["delete"].is_object());
    // What an operator changed stays.
    let kept = shipped(|seen| {
        let own = serde_json::json!({"version": 7, "mine": true});
        seen.full = true;
        seen.put
            .insert("_index_template/gantry-logs".to_owned(), own);
        seen.put
            .insert("_ilm/policy/gantry-logs".to_owned(), serde_json::json!({}));
    })
    .await;
    assert_eq!(kept[template]["mine"], true);
    assert_eq!(kept["_ilm/policy/gantry-logs"], serde_json::json!({}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_template_no_record_goes() {
    let yard = Yard::new().await;
    yard.server.with(|seen| seen.read_only = true);
    let last = yard.fill(lines(3)).await;
    let (shipper, stop) = (yard.shipper(), CancellationToken::new());
    let task = tokio::spawn(shipper.clone().run(stop.clone()));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(yard.server.with(|seen| seen.bulks), 0);
    yard.server.with(|seen| seen.read_only = false);
    until(|| shipper.position() >= last).await;
    stop.cancel();
    task.await.unwrap();
    yard.assert_all_there_once().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_way_in_is_shown_to_the_server() {
    type Way = (
        &'static [(&'static str, &'static str)],
        Option<&'static str>,
    );
    let ways: [Way; 4] = [
        (&[], None),
        (
            &[("ELASTICSEARCH_API_KEY", "aWQ6a2V5")],
            Some("ApiKey aWQ6a2V5"),
        ),
        (
            &[("ELASTICSEARCH_API_KEY", "id:key")],
            Some("ApiKey aWQ6a2V5"),
        ),
        (
            &[
                ("ELASTICSEARCH_USERNAME", "ada"),
                ("ELASTICSEARCH_PASSWORD", "pw"),
            ],
            Some("Basic YWRhOnB3"),
        ),
    ];
    for (variables, expected) in ways {
        let yard = Yard::new().await;
        let options = ShipperOptions::in_folder(yard.dir.path().join("shipper"));
        let elastic = yard.elastic(variables);
        assert!(!format!("{elastic:?}").contains("pw"));
        let shipper = Shipper::open(yard.journal.clone(), elastic, options).unwrap();
        let last = yard.fill(lines(1)).await;
        let stop = CancellationToken::new();
        let task = tokio::spawn(shipper.clone().run(stop.clone()));
        until(|| shipper.position() >= last).await;
        stop.cancel();
        task.await.unwrap();
        let shown = yard.server.with(|seen| seen.authorization.clone());
        assert_eq!(shown.as_deref(), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_made_anew_gets_its_templates_and_what_the_journal_has() {
    let yard = Yard::new().await;
    let (shipper, stop) = (yard.shipper(), CancellationToken::new());
    let task = tokio::spawn(shipper.clone().run(stop.clone()));
    let first = yard.fill(lines(50)).await;
    until(|| shipper.position() >= first).await;
    until(|| yard.server.with(|seen| !seen.journals.is_empty())).await;
    yard.server.with(Seen::wipe);
    // Noticed while nothing happens,
    until(|| yard.server.with(|seen| seen.documents.len() >= 52)).await;
    assert_eq!(yard.server.with(|seen| seen.put.len()), 2);
    yard.assert_all_there_once().await;
    // and not mistaken for templates that alone were removed.
    until(|| yard.server.with(|seen| !seen.journals.is_empty())).await;
    yard.server.with(|seen| {
        seen.put.clear();
        seen.documents.clear();
    });
    until(|| yard.server.with(|seen| seen.put.len() == 2)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(yard.server.with(|seen| seen.documents.len()), 0);
    let last = yard.fill(lines(10)).await;
    until(|| shipper.position() >= last).await;
    assert_eq!(yard.server.with(|seen| seen.documents.len()), 12);
    stop.cancel();
    task.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_search_is_called_slow_wherever_it_is_given_up() {
    let yard = Yard::new().await;
    let shipper = yard.shipper();
    let search = ElasticsearchSearch::new(yard.elastic(&[]), yard.journal.clone(), shipper, None);
    // Positive control.
    assert!(search.query(LogQuery::default()).await.is_ok());
    for slow in [Search::GivenUp, Search::Hangs] {
        yard.server.with(|seen| seen.search = slow);
        // What is known of other servers is asked for again.
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        let error = search.query(LogQuery::default()).await.unwrap_err();
        assert!(
            matches!(error, SearchError::Slow { .. }),
            "{slow:?}: {error}"
        );
        assert!(!error.to_string().contains("ELASTICSEARCH_HOST"));
    }
}
