//! Two replicas and one repl: what was asked for last serves, and nobody puts back what another replaced.

use gantry::model::{Order, ReplChange, SUPERSEDED, Serves};
use gantry::platform::kubernetes::CleanUp;
use gantry::platform::{PlatformError, ReleaseSpec};

use super::*;

/// Deployments that both replicas make at a time; a nightly run has more.
const ROUNDS: usize = 5;
const ROUNDS_IN_FULL: usize = 100;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn two_replicas_that_deploy_to_one_repl_leave_the_latest_serving() {
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    let rounds = if full { ROUNDS_IN_FULL } else { ROUNDS };
    let (one, other) = (Bed::start().await, Bed::start().await);
    let user = one.user("orders");
    let repl = one.repl(&user);
    for round in 0..rounds {
        let version = |name: &str| format!("VERSION = '{name}-{round}'\n{SERVER}");
        let first = one
            .spec(&user, &repl, &version("first"), BTreeMap::new())
            .await;
        let second = one
            .spec(&user, &repl, &version("second"), BTreeMap::new())
            .await;
        assert!(first.order.is_before(&second.order));
        // The one that was sent first begins first in every second round.
        let late = |wait: bool| Duration::from_millis(if wait { 300 } else { 0 });
        let deploy = async |bed: &Bed, spec: &ReleaseSpec, wait: bool| {
            tokio::time::sleep(late(wait)).await;
            bed.platform.ensure_release(spec).await
        };
        let (early, last) = tokio::join!(
            deploy(&one, &first, round % 2 == 1),
            deploy(&other, &second, round % 2 == 0)
        );
        last.unwrap();
        match early {
            Ok(_) => {}
            Err(PlatformError::NotReady(problem)) => assert_eq!(problem.code, SUPERSEDED),
            Err(error) => panic!("{error:?}"),
        }
        let page = other.page(&repl).await;
        assert!(page.contains(&format!("second-{round}")), "{round}: {page}");
        let releases = one.platform.releases(&repl).await.unwrap();
        let current = releases.iter().filter(|r| r.state == ReleaseState::Current);
        let current: Vec<_> = current.map(|r| r.submission_id).collect();
        assert_eq!(current, [second.submission_id], "{round}");
    }
    // A stop that one replica was asked for is not undone by what the other was asked for before.
    let before = one.spec(&user, &repl, SERVER, BTreeMap::new()).await;
    let order = Order::now();
    other.platform.ordered(&repl, &order).await.unwrap();
    other.platform.drop_repl(&repl).await.unwrap();
    let refused = one.platform.ensure_release(&before).await.unwrap_err();
    assert!(
        matches!(&refused, PlatformError::NotReady(problem) if problem.code == SUPERSEDED),
        "{refused:?}"
    );
    assert!(one.platform.dial(&repl).await.is_err());
    one.forget(user.as_str()).await;
}

/// A page that shows the variable beside the version.
const SHOWS_COLOUR: &str = "import os\nVERSION += ' ' + os.environ.get('COLOUR', 'none')\n";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_variable_that_one_replica_changes_while_the_other_deploys_is_the_latest_releases() {
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    let rounds = if full { ROUNDS_IN_FULL } else { ROUNDS };
    let (one, other) = (Bed::start().await, Bed::start().await);
    let user = one.user("settings");
    let repl = one.repl(&user);
    let code = |version: &str| format!("VERSION = '{version}'\n{SHOWS_COLOUR}{SERVER}");
    let first = one
        .spec(&user, &repl, &code("none yet"), BTreeMap::new())
        .await;
    one.platform.ensure_release(&first).await.unwrap();
    for round in 0..rounds {
        let spec = other
            .spec(
                &user,
                &repl,
                &code(&format!("round-{round}")),
                BTreeMap::new(),
            )
            .await;
        let colour = serde_json::json!({ "env": { "COLOUR": format!("colour-{round}") } });
        let change = ReplChange::Variables(serde_json::from_value(colour).unwrap());
        // Each begins first, or in the middle of the other.
        let late = |wait: bool| Duration::from_millis(if wait { 700 } else { 0 });
        let configured = async {
            tokio::time::sleep(late(round % 3 == 1)).await;
            one.platform.configure(&repl, &change).await
        };
        let deployed = async {
            tokio::time::sleep(late(round % 3 == 2)).await;
            other.platform.ensure_release(&spec).await
        };
        let (configured, deployed) = tokio::join!(configured, deployed);
        let (settings, running) = (configured.unwrap(), deployed.unwrap());
        let expected = format!("round-{round} colour-{round}");
        assert_eq!(settings.env["COLOUR"], format!("colour-{round}"));
        let page = other.page(&repl).await;
        assert!(page.contains(&expected), "{round}: {page}");
        let releases = one.platform.releases(&repl).await.unwrap();
        let current = releases.iter().filter(|r| r.state == ReleaseState::Current);
        let current: Vec<_> = current.map(|r| r.release).collect();
        assert_eq!(current, [running.release], "{round}");
        let now = one.platform.settings(&repl).await.unwrap();
        assert_eq!(now.env["COLOUR"], format!("colour-{round}"), "{round}");
    }
    // One that the program ends with is taken back, and what was deployed meanwhile stays.
    let broken =
        "import os\nif os.environ['COLOUR'] == 'broken': raise SystemExit('no such colour')\n";
    let code = |version: &str| format!("{broken}{}", code(version));
    let spec = one
        .spec(&user, &repl, &code("before"), BTreeMap::new())
        .await;
    one.platform.ensure_release(&spec).await.unwrap();
    let spec = other
        .spec(&user, &repl, &code("after"), BTreeMap::new())
        .await;
    let change = serde_json::json!({ "env": { "COLOUR": "broken" } });
    let change = ReplChange::Variables(serde_json::from_value(change).unwrap());
    let deployed = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        other.platform.ensure_release(&spec).await
    };
    let (configured, deployed) = tokio::join!(one.platform.configure(&repl, &change), deployed);
    assert!(configured.is_err(), "{configured:?}");
    deployed.unwrap();
    let last = format!("after colour-{}", rounds - 1);
    let page = one.page(&repl).await;
    assert!(page.contains(&last), "{page}");
    one.platform.drop_repl(&repl).await.unwrap();
    one.forget(user.as_str()).await;
}

/// How long the release takes to listen that is gone back to: what comes meanwhile has some seconds for it.
const SLOW_TO_LISTEN: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_slow_rollback_stands_against_what_was_sent_before_and_gives_way_to_what_is_sent_later() {
    let (one, other) = (Bed::start().await, Bed::start().await);
    let user = one.user("slow-back");
    let repl = one.repl(&user);
    let wait = SLOW_TO_LISTEN.as_secs();
    let slow = format!("import time; time.sleep({wait})\nVERSION = 'slow'\n{SERVER}");
    for code in [slow, format!("VERSION = 'quick'\n{SERVER}")] {
        let mut spec = one.spec(&user, &repl, &code, BTreeMap::new()).await;
        spec.serves = Serves::Yes;
        one.platform.ensure_release(&spec).await.unwrap();
    }
    let version = |name: &str| format!("VERSION = '{name}'\n{SERVER}");
    // At the same replica it waits for its lock, at the other for its turn.
    for bed in [&one, &other] {
        let before = one
            .spec(&user, &repl, &version("before"), BTreeMap::new())
            .await;
        let order = Order::now();
        let deploy = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            bed.platform.ensure_release(&before).await
        };
        let (back, refused) = tokio::join!(one.platform.rollback(&repl, Some(1), &order), deploy);
        assert_eq!(back.unwrap().release, 1);
        let refused = refused.unwrap_err();
        assert!(
            matches!(&refused, PlatformError::NotReady(problem) if problem.code == SUPERSEDED),
            "{refused:?}"
        );
        assert!(one.page(&repl).await.contains("slow"));
        let later = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let code = version("later");
            let later = one.spec(&user, &repl, &code, BTreeMap::new()).await;
            bed.platform.ensure_release(&later).await
        };
        let order = Order::now();
        let (back, later) = tokio::join!(one.platform.rollback(&repl, Some(1), &order), later);
        assert_eq!(back.unwrap().release, 1);
        later.unwrap();
        assert!(one.page(&repl).await.contains("later"));
    }
    one.platform.drop_repl(&repl).await.unwrap();
    one.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn the_cleaner_leaves_a_repl_alone_whose_record_cannot_be_read() {
    let bed = Bed::start().await;
    let user = bed.user("damaged");
    let repl = bed.repl(&user);
    let code = format!("VERSION = 'live'\n{SERVER}");
    let spec = bed.spec(&user, &repl, &code, BTreeMap::new()).await;
    bed.platform.ensure_release(&spec).await.unwrap();
    let records: Api<ConfigMap> = Api::namespaced(bed.client.clone(), NAMESPACE);
    let name = format!("repl-{repl}");
    let whole = records.get(&name).await.unwrap().data.unwrap()["record"].clone();
    let set = async |text: &str| {
        let patch = serde_json::json!({ "data": { "record": text } });
        let patch = Patch::Merge(&patch);
        let params = PatchParams::default();
        records.patch(&name, &params, &patch).await.unwrap();
    };
    set("{\"user_id\": \"damag").await;
    let options = CleanUp {
        settled: Duration::ZERO,
        idle: Duration::ZERO,
        ..CleanUp::new(false, Duration::ZERO)
    };
    let cleaner = bed.platform.cleaner(bed.store.clone(), options);
    let found = cleaner.round().await.unwrap();
    let own = |text: String| text.contains(repl.as_str()) || text.contains(user.as_str());
    assert!(
        !found.iter().any(|orphan| own(orphan.to_string())),
        "{found:?}"
    );
    set(&whole).await;
    eventually("the repl serves as before", || async {
        bed.platform.dial(&repl).await.is_ok() && bed.page(&repl).await.contains("live")
    })
    .await;
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}
