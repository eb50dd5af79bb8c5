//! Several servers whose records meet in one Elasticsearch.

use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::stream::BoxStream;
use tokio::time::Instant;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Elasticsearch"]
async fn each_server_finds_and_follows_the_others_records() {
    let prefix = format!("test-{}", SubmissionId::new());
    let (one, two) = (House::sharing(&prefix), House::sharing(&prefix));
    let seen_by_one = follow_marks(&one);
    one.submit("ada", &["mark of one"], Status::TestsPassed)
        .await;
    two.submit("bob", &["mark of two"], Status::TestsPassed)
        .await;
    let both = LogQuery {
        q: Some("mark".into()),
        ..LogQuery::default()
    };
    for house in [&one, &two] {
        eventually(async || house.find(both.clone()).await.len() == 2).await;
    }
    // A page from before, then from its end: nothing twice, nothing missed, whoever wrote it.
    let first = LogQuery {
        limit: 1,
        ..both.clone()
    };
    let page = one.search.query(first).await.unwrap();
    assert_eq!(page.records.len(), 1);
    let mut seen = Vec::new();
    two.submit("bob", &["mark of two again"], Status::TestsPassed)
        .await;
    one.submit("ada", &["mark of one again"], Status::TestsPassed)
        .await;
    let mut after = page.next;
    eventually(async || {
        let query = LogQuery {
            after: after.clone(),
            ..both.clone()
        };
        let page = one.search.query(query).await.unwrap();
        seen.extend(messages(&page.records));
        after = page.next;
        seen.len() >= 2
    })
    .await;
    seen.sort();
    assert_eq!(seen, ["mark of one again", "mark of two again"]);

    let query = SubmissionQuery {
        users: Some("bob".parse().unwrap()),
        repl_id: None,
        status: None,
        limit: 10,
        before: None,
        asker: None,
    };
    let list = one.search.submissions(query).await.unwrap();
    assert_eq!(list.submissions.len(), 2);
    let mut followed = tokio::time::timeout(PATIENCE, seen_by_one)
        .await
        .unwrap()
        .unwrap();
    followed.sort();
    let expected = [
        "mark of one",
        "mark of one again",
        "mark of two",
        "mark of two again",
    ];
    assert_eq!(followed, expected);
    two.close().await;
    one.close().await;
}

/// Another server that answers, as far as `up` says.
#[derive(Debug)]
struct Next {
    journal: Journal,
    up: Arc<AtomicBool>,
}

impl Neighbours for Next {
    fn follow(&self, query: &LogQuery) -> BoxStream<'static, News> {
        let up = Arc::clone(&self.up);
        let news = own_news(&self.journal, query.clone()).unwrap();
        let while_up = news
            .map(|news| news.unwrap())
            .take_while(move |_| std::future::ready(up.load(Ordering::Relaxed)));
        while_up.chain(futures_util::stream::pending()).boxed()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Elasticsearch"]
async fn anothers_record_is_followed_at_once_and_when_it_cannot_be_asked_from_the_index() {
    let prefix = format!("test-{}", SubmissionId::new());
    let other = House::sharing(&prefix);
    let up = Arc::new(AtomicBool::new(true));
    let next = Next {
        journal: other.journal.clone(),
        up: Arc::clone(&up),
    };
    let one = House::among(&prefix, Some(Arc::new(next)));
    other.elastic.as_ref().unwrap().make_today().await.unwrap();
    other.submit("bob", &["mark 0"], Status::TestsPassed).await;
    let marks = LogQuery {
        q: Some("mark".into()),
        ..LogQuery::default()
    };
    eventually(async || one.find(marks.clone()).await.len() == 1).await;
    let mut live = one.search.follow(marks);
    let mut seen = vec![messages(&[live.next().await.unwrap().unwrap()]).remove(0)];
    let (id, own) = (SubmissionId::new(), SubmissionId::new());
    other.add("bob", id, received("bob", id)).await;
    one.add("ada", own, received("ada", own)).await;
    let mut waits = Vec::new();
    for n in 1..=30 {
        let made = Instant::now();
        other.add("bob", id, output(&format!("mark {n}"))).await;
        let record = tokio::time::timeout(PATIENCE, live.next()).await.unwrap();
        waits.push(made.elapsed());
        seen.push(messages(&[record.unwrap().unwrap()]).remove(0));
        // Of this server too, in between.
        one.add("ada", own, output("own")).await;
    }
    waits.sort();
    // Far below the second that the index takes; how far exactly is measured elsewhere.
    assert!(waits[15] < Duration::from_millis(200), "{waits:?}");
    up.store(false, Ordering::Relaxed);
    for n in 31..=40 {
        other.add("bob", id, output(&format!("mark {n}"))).await;
    }
    while seen.len() <= 40 {
        let record = tokio::time::timeout(PATIENCE, live.next()).await.unwrap();
        seen.push(messages(&[record.unwrap().unwrap()]).remove(0));
    }
    let expected: Vec<String> = (0..=40).map(|n| format!("mark {n}")).collect();
    assert_eq!(seen, expected);
    drop(live);
    other.close().await;
    one.close().await;
}

/// Longest wait for another server's records: they are announced and looked for once a second.
const PATIENCE: Duration = Duration::from_secs(20);

async fn eventually(mut check: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check().await {
        assert!(Instant::now() < deadline, "not in time");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The next four marks that a follower of this server sees.
fn follow_marks(house: &House) -> JoinHandle<Vec<String>> {
    let stream = house.search.follow(LogQuery {
        q: Some("mark".into()),
        ..LogQuery::default()
    });
    tokio::spawn(async move {
        let texts = stream.map(|record| messages(&[record.unwrap()]).remove(0));
        texts.take(4).collect().await
    })
}
