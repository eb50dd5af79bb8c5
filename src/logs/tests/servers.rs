//! Several servers whose records meet in one Elasticsearch.

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

/// Longest wait for another server's records: they are announced and looked for once a second.
const PATIENCE: Duration = Duration::from_secs(20);

async fn eventually(mut check: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !check().await {
        assert!(tokio::time::Instant::now() < deadline, "not in time");
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
