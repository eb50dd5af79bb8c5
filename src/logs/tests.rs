//! The search's promises.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod faults;
mod load;
mod rights;
mod scripted;
mod servers;
mod shape;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::query::Filter;
use super::*;
use crate::journal::{Journal, JournalOptions, NewRecord};
use crate::model::{
    Event, Limits, Outcome, OutputStream, Record, Status, SubmissionId, SubmissionRequest,
};

/// A journal, and a search of it.
struct House {
    dir: TempDir,
    journal: Journal,
    search: Arc<dyn LogSearch>,
    elastic: Option<Elasticsearch>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl House {
    fn embedded() -> Self {
        Self::on(TempDir::new().unwrap(), SearchOptions::default())
    }

    fn on(dir: TempDir, options: SearchOptions) -> Self {
        let journal = open_journal(&dir);
        let path = dir.path().join("search.sqlite");
        let search = EmbeddedSearch::open_with(&path, journal.clone(), options).unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(search.clone().run(stop.clone()));
        Self {
            dir,
            journal,
            search: Arc::new(search),
            elastic: None,
            stop,
            task,
        }
    }

    /// On the server in `ELASTICSEARCH_HOST`, with indices of its own.
    async fn elasticsearch() -> Self {
        let house = Self::sharing(&format!("test-{}", SubmissionId::new()));
        house.elastic.as_ref().unwrap().make_today().await.unwrap();
        house
    }

    /// One of several servers whose indices begin like this.
    fn sharing(prefix: &str) -> Self {
        Self::among(prefix, None)
    }

    /// The same, which can ask these others what has just happened there.
    fn among(prefix: &str, others: Option<Arc<dyn Neighbours>>) -> Self {
        let dir = TempDir::new().unwrap();
        let journal = open_journal(&dir);
        let settings = ElasticsearchSettings::from_variables(|name| match name {
            "ELASTICSEARCH_INDEX_PREFIX" => Some(prefix.to_owned()),
            _ => std::env::var(name).ok(),
        });
        let settings = settings.unwrap().expect("ELASTICSEARCH_HOST is not set");
        let elastic = Elasticsearch::new(&settings).unwrap();
        let options = ShipperOptions::in_folder(dir.path().join("shipper"));
        let shipper = Shipper::open(journal.clone(), elastic.clone(), options).unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(shipper.clone().run(stop.clone()));
        let search = ElasticsearchSearch::new(elastic.clone(), journal.clone(), shipper, others);
        Self {
            dir,
            journal,
            search: Arc::new(search),
            elastic: Some(elastic),
            stop,
            task,
        }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("search.sqlite")
    }

    async fn close(self) -> TempDir {
        self.stop.cancel();
        self.task.await.unwrap();
        self.journal.close().await.unwrap();
        if let Some(elastic) = &self.elastic {
            elastic.remove_all().await;
        }
        self.dir
    }

    async fn restart(self, between: impl FnOnce(&std::path::Path)) -> Self {
        let dir = self.close().await;
        between(&dir.path().join("search.sqlite"));
        Self::on(dir, SearchOptions::default())
    }

    /// Appends and waits until it is durable.
    async fn add(&self, user: &str, id: SubmissionId, event: Event) -> u64 {
        let record = NewRecord {
            user_id: user.parse().unwrap(),
            submission_id: Some(id),
            repl_id: format!("{user}-prod").parse().unwrap(),
            event,
        };
        let position = self.journal.append(record).await.unwrap().position;
        self.journal.durable(position).await.unwrap();
        position
    }

    /// Received, one line of output for each text, and a reply.
    async fn submit(&self, user: &str, texts: &[&str], status: Status) -> SubmissionId {
        let id = SubmissionId::new();
        self.add(user, id, received(user, id)).await;
        for text in texts {
            self.add(user, id, output(text)).await;
        }
        self.add(user, id, Event::Reply(Box::new(Outcome::new(status))))
            .await;
        id
    }

    async fn find(&self, query: LogQuery) -> Vec<String> {
        messages(&self.search.query(query).await.unwrap().records)
    }

    async fn find_words(&self, q: &str) -> Vec<String> {
        self.find(LogQuery {
            q: Some(q.to_owned()),
            ..LogQuery::default()
        })
        .await
    }
}

fn open_journal(dir: &TempDir) -> Journal {
    Journal::open(&dir.path().join("journal"), JournalOptions::default()).unwrap()
}

fn received(user: &str, id: SubmissionId) -> Event {
    let json = json!({"user_id": user, "submission_id": id, "code": "print(1)"});
    let request: SubmissionRequest = serde_json::from_value(json).unwrap();
    Event::Received {
        submission: Box::new(request.validate(&Limits::MAXIMUM).unwrap()),
        key: None,
    }
}

fn output(text: &str) -> Event {
    Event::Output {
        stream: OutputStream::Stdout,
        data: text.to_owned(),
        run: 0,
        run_seq: 1,
    }
}

fn messages(records: &[LogRecord]) -> Vec<String> {
    let message = |r: &LogRecord| r.fields["message"].as_str().unwrap().to_owned();
    records.iter().map(message).collect()
}

/// Every promise of a search, kept by each implementation.
macro_rules! suite {
    ($($promise:ident),* $(,)?) => {
        mod embedded {
            use super::House;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                let house = House::embedded();
                super::$promise(&house).await;
                house.close().await;
            })*
        }
        mod elasticsearch {
            use super::House;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "needs Elasticsearch"]
            async fn $promise() {
                let house = House::elasticsearch().await;
                super::$promise(&house).await;
                house.close().await;
            })*
        }
    };
}

suite!(
    every_filter_narrows,
    times_narrow,
    words_and_phrases_are_found_and_syntax_is_only_text,
    a_wrong_field_is_named,
    pages_go_forward_from_the_newest_and_from_any_cursor,
    a_client_reads_its_own_writes,
    submissions_are_listed_newest_first_with_their_state,
    followers_see_every_match_once_from_wherever_they_begin,
);

async fn every_filter_narrows(house: &House) {
    let ada = house
        .submit("ada", &["alpha", "beta gamma"], Status::TestsPassed)
        .await;
    let bob = house.submit("bob", &["alpha"], Status::TestsFailed).await;
    let base = LogQuery::default;
    assert_eq!(house.find(base()).await.len(), 7);
    let users = LogQuery {
        users: Some("ada".parse().unwrap()),
        ..base()
    };
    assert_eq!(house.find(users.clone()).await.len(), 4);
    let repl = LogQuery {
        repl_id: Some("bob-prod".parse().unwrap()),
        ..base()
    };
    assert_eq!(house.find(repl.clone()).await.len(), 3);
    assert!(
        house
            .find(LogQuery {
                users: users.users.clone(),
                ..repl
            })
            .await
            .is_empty()
    );
    let submission = LogQuery {
        submission_id: Some(bob),
        ..base()
    };
    assert_eq!(house.find(submission.clone()).await[1], "alpha");
    assert!(
        house
            .find(LogQuery {
                users: users.users.clone(),
                ..submission
            })
            .await
            .is_empty()
    );
    let step = LogQuery {
        step: Some("test".into()),
        ..base()
    };
    assert_eq!(house.find(step).await, ["alpha", "beta gamma", "alpha"]);
    let level = LogQuery {
        level: Some("warn".into()),
        ..base()
    };
    assert_eq!(house.find(level).await, ["Tests failed"]);
    let words = LogQuery {
        q: Some("alpha".into()),
        submission_id: Some(ada),
        ..base()
    };
    assert_eq!(house.find(words).await, ["alpha"]);
}

async fn times_narrow(house: &House) {
    house.submit("ada", &["first"], Status::TestsPassed).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let between = Timestamp::now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    house.submit("ada", &["second"], Status::TestsPassed).await;
    for q in [
        None,
        Some("first second".split(' ').next().unwrap().to_owned()),
    ] {
        let until = LogQuery {
            until: Some(between),
            q,
            ..LogQuery::default()
        };
        assert!(house.find(until).await.contains(&"first".to_owned()));
    }
    let since = LogQuery {
        since: Some(between),
        ..LogQuery::default()
    };
    assert_eq!(
        house.find(since.clone()).await,
        ["Submission received: python", "second", "Tests passed"]
    );
    assert!(
        house
            .find(LogQuery {
                until: Some(between),
                ..since
            })
            .await
            .is_empty()
    );
    let future = LogQuery {
        since: Some(Timestamp::now() + SignedDuration::from_hours(1)),
        ..LogQuery::default()
    };
    assert!(house.find(future).await.is_empty());
}

async fn words_and_phrases_are_found_and_syntax_is_only_text(house: &House) {
    let texts = [
        "the quick brown fox",
        "quick: brown_dog NEAR(x)",
        "Straße ÜBER 漢字",
    ];
    house.submit("ada", &texts, Status::TestsPassed).await;
    assert_eq!(house.find_words("QUICK brown").await.len(), 2);
    assert_eq!(house.find_words("\"brown fox\"").await, [texts[0]]);
    assert_eq!(house.find_words("\"fox brown\"").await, [] as [&str; 0]);
    assert_eq!(house.find_words("über straße").await, [texts[2]]);
    assert_eq!(house.find_words("bro* fo*").await, [texts[0]]);
    assert_eq!(house.find_words("brown_dog").await, [texts[1]]);
    assert_eq!(house.find_words("\"quick brown").await.len(), 2);
    for hostile in [
        "NEAR(",
        "text:quick AND",
        "quick OR (",
        "^quick + \"",
        "a\"b\"c'--",
        "-quick",
        "{x} : ",
        "\0quick",
        "*quick",
    ] {
        let _ = house.find_words(hostile).await;
    }
    assert_eq!(house.find_words("NOT quick").await, [] as [&str; 0]);
}

async fn a_wrong_field_is_named(house: &House) {
    let base = LogQuery::default;
    let cases = [
        (
            LogQuery {
                step: Some("tset".into()),
                ..base()
            },
            "step",
        ),
        (
            LogQuery {
                level: Some("loud".into()),
                ..base()
            },
            "level",
        ),
        (
            LogQuery {
                after: Some("-1".into()),
                ..base()
            },
            "after",
        ),
        (
            LogQuery {
                after: Some(u64::MAX.to_string()),
                ..base()
            },
            "after",
        ),
        (
            LogQuery {
                q: Some("x".repeat(1025)),
                ..base()
            },
            "q",
        ),
        (
            LogQuery {
                q: Some("!?".into()),
                ..base()
            },
            "q",
        ),
    ];
    for (query, field) in cases {
        let Err(SearchError::Field(error)) = house.search.query(query.clone()).await else {
            panic!()
        };
        assert_eq!(error.field, field);
        let mut stream = Box::pin(house.search.follow(query));
        assert!(matches!(
            stream.next().await,
            Some(Err(SearchError::Field(_)))
        ));
        assert!(stream.next().await.is_none());
    }
    let query = SubmissionQuery {
        users: None,
        repl_id: None,
        status: Some("lost".into()),
        limit: 1,
        before: None,
        asker: None,
    };
    let Err(SearchError::Field(error)) = house.search.submissions(query).await else {
        panic!()
    };
    assert_eq!(error.field, "status");
}

async fn pages_go_forward_from_the_newest_and_from_any_cursor(house: &House) {
    let texts: Vec<String> = (0..25).map(|n| format!("line {n}")).collect();
    let id = SubmissionId::new();
    house.add("ada", id, received("ada", id)).await;
    let begin = house.search.query(LogQuery::default()).await.unwrap().next;
    for text in &texts {
        house.add("ada", id, output(text)).await;
    }
    let newest = house
        .search
        .query(LogQuery {
            limit: 5,
            ..LogQuery::default()
        })
        .await
        .unwrap();
    assert_eq!(messages(&newest.records), texts[20..]);
    let query = LogQuery {
        after: newest.next.clone(),
        ..LogQuery::default()
    };
    let nothing = house.search.query(query.clone()).await.unwrap();
    assert!(nothing.records.is_empty() && nothing.next == newest.next);
    house.add("ada", id, output("more")).await;
    assert_eq!(house.find(query).await, ["more"]);
    for q in [None, Some("line".to_owned())] {
        let mut seen = Vec::new();
        let mut after = begin.clone();
        loop {
            let query = LogQuery {
                limit: 4,
                after,
                q: q.clone(),
                ..LogQuery::default()
            };
            let page = house.search.query(query).await.unwrap();
            if page.records.is_empty() {
                break;
            }
            seen.extend(messages(&page.records));
            after = page.next;
        }
        assert_eq!(seen[..25], texts);
    }
}

async fn a_client_reads_its_own_writes(house: &House) {
    for n in 0..30 {
        let id = house
            .submit("ada", &[&format!("unique{n}")], Status::TestsPassed)
            .await;
        let query = LogQuery {
            submission_id: Some(id),
            q: Some(format!("unique{n}")),
            ..LogQuery::default()
        };
        assert_eq!(house.find(query).await.len(), 1);
    }
}

async fn submissions_are_listed_newest_first_with_their_state(house: &House) {
    let mut ids = Vec::new();
    for n in 0..6 {
        let user = if n % 2 == 0 { "ada" } else { "bob" };
        let status = if n < 3 {
            Status::TestsPassed
        } else {
            Status::TestsFailed
        };
        ids.push(house.submit(user, &[], status).await);
    }
    let open = SubmissionId::new();
    house.add("ada", open, received("ada", open)).await;
    ids.push(open);
    ids.reverse();
    let base = || SubmissionQuery {
        users: None,
        repl_id: None,
        status: None,
        limit: 50,
        before: None,
        asker: None,
    };
    let list = async |query: SubmissionQuery| {
        let page = house.search.submissions(query).await.unwrap();
        let ids: Vec<_> = page.submissions.iter().map(|s| s.submission_id).collect();
        (ids, page)
    };
    let (all, page) = list(base()).await;
    assert_eq!(all, ids);
    assert_eq!(page.next, None);
    assert_eq!(page.submissions[0].status, None);
    assert_eq!(page.submissions[1].status, Some(Status::TestsFailed));
    assert_eq!(page.submissions[1].language, "python");
    let (first, page) = list(SubmissionQuery { limit: 4, ..base() }).await;
    let (second, end) = list(SubmissionQuery {
        limit: 4,
        before: page.next,
        asker: None,
        ..base()
    })
    .await;
    assert_eq!([first, second].concat(), ids);
    assert_eq!(end.next, None);
    assert_eq!(
        list(SubmissionQuery {
            users: Some("bob".parse().unwrap()),
            ..base()
        })
        .await
        .0
        .len(),
        3
    );
    assert_eq!(
        list(SubmissionQuery {
            repl_id: Some("ada-prod".parse().unwrap()),
            ..base()
        })
        .await
        .0
        .len(),
        4
    );
    assert_eq!(
        list(SubmissionQuery {
            status: Some("tests_passed".into()),
            ..base()
        })
        .await
        .0
        .len(),
        3
    );
    assert_eq!(
        list(SubmissionQuery {
            status: Some("running".into()),
            ..base()
        })
        .await
        .0,
        [open]
    );
}

#[tokio::test]
async fn every_record_is_indexed_once_over_restarts_and_rebuilds() {
    let mut house = House::embedded();
    house.submit("ada", &["before"], Status::TestsPassed).await;
    let expected = house.find(LogQuery::default()).await;
    let damages: [fn(&std::path::Path); 4] = [
        |_| {},
        |file| std::fs::remove_file(file).unwrap(),
        |file| std::fs::write(file, vec![7; 9000]).unwrap(),
        |file| {
            let connection = rusqlite::Connection::open(file).unwrap();
            connection.pragma_update(None, "user_version", 99).unwrap();
        },
    ];
    for damage in damages {
        house = house.restart(damage).await;
        assert_eq!(house.find(LogQuery::default()).await, expected);
        assert_eq!(house.find_words("before").await, ["before"]);
        assert!(house.file().exists());
    }
    // An index of another journal.
    let dir = house.close().await;
    std::fs::remove_dir_all(dir.path().join("journal")).unwrap();
    let house = House::on(dir, SearchOptions::default());
    assert!(house.find(LogQuery::default()).await.is_empty());
    house.submit("ada", &["after"], Status::TestsPassed).await;
    assert_eq!(house.find_words("after").await, ["after"]);
}

#[tokio::test]
async fn old_records_leave_the_index() {
    let dir = TempDir::new().unwrap();
    let options = SearchOptions {
        max_bytes: 1 << 30,
        max_age: Duration::from_secs(1),
    };
    let house = House::on(dir, options);
    house.submit("ada", &["ancient"], Status::TestsPassed).await;
    assert_eq!(house.find_words("ancient").await.len(), 1);
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    in_time(async || {
        house.submit("ada", &["recent"], Status::TestsPassed).await;
        house.find_words("ancient").await.is_empty()
    })
    .await;
    assert!(!house.find_words("recent").await.is_empty());

    let options = SearchOptions {
        max_bytes: 1,
        max_age: Duration::from_secs(3600),
    };
    let small = House::on(house.close().await, options);
    small.submit("ada", &["one"], Status::TestsPassed).await;
    in_time(async || small.find(LogQuery::default()).await.len() <= 3).await;
}

/// Waits until this holds: what is past its bound leaves the index when something else comes into it.
async fn in_time(holds: impl AsyncFn() -> bool) {
    let begun = std::time::Instant::now();
    while !holds().await {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "it still does not hold"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_makes_the_index_little_larger_than_its_bound() {
    const BOUND: u64 = 8 << 20;
    let options = SearchOptions {
        max_bytes: BOUND,
        max_age: Duration::from_secs(3600),
    };
    let house = House::on(TempDir::new().unwrap(), options);
    let id = SubmissionId::new();
    house.add("ada", id, received("ada", id)).await;
    let (mut most, mut number) = (0, 0_u64);
    for _ in 0..600 {
        // Words that come once only are what takes most room in an index.
        let mut text = String::new();
        while text.len() < 64 << 10 {
            number += 1;
            text.push_str(&format!(
                "{:x} ",
                number.wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ));
        }
        house.add("ada", id, output(&text)).await;
        most = most.max(std::fs::metadata(house.file()).unwrap().len());
    }
    house.find_words("0").await;
    most = most.max(std::fs::metadata(house.file()).unwrap().len());
    assert!(most < BOUND * 6 / 5, "{most}");
}

async fn followers_see_every_match_once_from_wherever_they_begin(house: &House) {
    let id = SubmissionId::new();
    house.add("ada", id, received("ada", id)).await;
    house.add("ada", id, output("begin marker")).await;
    let begin = house.search.query(LogQuery::default()).await.unwrap().next;
    let mut followers = Vec::new();
    for n in 0..300 {
        if n % 15 == 0 {
            let after = begin.clone().filter(|_| n % 2 == 0);
            let query = LogQuery {
                q: Some("marker".into()),
                limit: 7,
                after,
                ..LogQuery::default()
            };
            let stream = house.search.follow(query);
            followers.push(tokio::spawn(async move {
                let texts = stream.map(|r| messages(&[r.unwrap()]).remove(0));
                let until = texts.take_while(|text| std::future::ready(text != "end marker"));
                until.collect::<Vec<_>>().await
            }));
        }
        let text = if n % 3 == 0 {
            format!("marker {n}")
        } else {
            format!("other {n}")
        };
        house
            .journal
            .append(NewRecord {
                user_id: "ada".parse().unwrap(),
                submission_id: Some(id),
                repl_id: "ada-prod".parse().unwrap(),
                event: output(&text),
            })
            .await
            .unwrap();
        if n % 10 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    house.add("ada", id, output("end marker")).await;
    let expected: Vec<String> = (0..300).step_by(3).map(|n| format!("marker {n}")).collect();
    for (index, follower) in followers.into_iter().enumerate() {
        let seen = follower.await.unwrap();
        if index % 2 == 0 {
            assert_eq!(seen, expected);
        } else {
            // From the newest few on, without a gap.
            let tail = seen.iter().filter(|text| *text != "begin marker").count();
            assert_eq!(seen[seen.len() - tail..], expected[expected.len() - tail..]);
            assert!(!seen.is_empty());
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    /// What a follower lets through is what the index finds.
    #[test]
    fn live_and_indexed_search_agree(text in "[a-c \"*_.-]{0,12}", q in "[a-c \"*_.-]{1,6}") {
        let record = Record {
            position: 1,
            time: Timestamp::UNIX_EPOCH,
            user_id: "ada".parse().unwrap(),
            submission_id: None,
            repl_id: "shop".parse().unwrap(),
            seq: None,
            event: output(&text),
        };
        let query = LogQuery { q: Some(q.clone()), ..LogQuery::default() };
        if let Ok(filter) = Filter::try_from(query) {
            let live = filter.accept(&record).is_some();
            let connection = rusqlite::Connection::open_in_memory().unwrap();
            connection.execute_batch("CREATE VIRTUAL TABLE words USING fts5 (text, tokenize = 'unicode61 remove_diacritics 0')").unwrap();
            connection.execute("INSERT INTO words VALUES (?1)", [&text]).unwrap();
            let indexed = match filter.full_text() {
                Some(words) => connection.query_row("SELECT count(*) FROM words WHERE words MATCH ?1", [words], |r| r.get::<_, i64>(0)).unwrap() == 1,
                None => true,
            };
            assert_eq!(live, indexed, "{text:?} {q:?}");
        }
    }
}
