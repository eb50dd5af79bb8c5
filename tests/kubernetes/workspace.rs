//! Repls that are started from what is in the bucket, on the bed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use gantry::model::{Order, RelativePath, ReplId, ReplState, SubmissionId, UserId};
use gantry::platform::{Platform, PlatformError, WorkspaceSpec};
use gantry::storage::CodeStore;
use kube::api::{DynamicObject, ListParams};
use kube::core::ApiResource;
use kube::discovery::{Discovery, Scope};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::bed::{Bed, PATIENCE, SERVER, eventually};

fn spec(user: &UserId, repl: &ReplId) -> WorkspaceSpec {
    WorkspaceSpec {
        user_id: user.clone(),
        repl_id: repl.clone(),
        order: Order::now(),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
    }
}

/// Puts a program where another service would.
async fn put(bed: &Bed, repl: &ReplId, code: &str) {
    let path = RelativePath::try_from("main.py".to_owned()).unwrap();
    let files = BTreeMap::from([(path, code.to_owned())]);
    let published = bed.store.publish(repl, SubmissionId::new(), &files);
    published.await.unwrap();
}

async fn served(bed: &Bed, repl: &ReplId, says: &str) {
    eventually("the repl serves", || async {
        bed.platform.dial(repl).await.is_ok() && bed.page(repl).await.contains(says)
    })
    .await;
}

/// Everything in the user's namespace that has the repl's name in its own, of every kind there is.
async fn left(bed: &Bed, user: &UserId, repl: &ReplId) -> Vec<String> {
    let discovery = Discovery::new(bed.client.clone()).run().await.unwrap();
    let mut left = Vec::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            if capabilities.scope == Scope::Namespaced && capabilities.supports_operation("list") {
                left.extend(named(bed, user, repl, &resource).await);
            }
        }
    }
    left
}

async fn named(bed: &Bed, user: &UserId, repl: &ReplId, resource: &ApiResource) -> Vec<String> {
    // What is told of things that were is no thing itself.
    if resource.kind == "Event" {
        return Vec::new();
    }
    let api: Api<DynamicObject> =
        Api::namespaced_with(bed.client.clone(), &user.namespace(), resource);
    let found = api.list(&ListParams::default()).await.unwrap();
    let found = found.into_iter().map(|object| object.name_any());
    found
        .filter(|name| name.contains(repl.as_str()))
        .map(|name| format!("{}/{name}", resource.kind))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_stopped_workspace_leaves_nothing_of_any_kind() {
    let bed = Bed::start().await;
    let user = bed.user("opened");
    let repl = bed.repl(&user);
    put(&bed, &repl, &format!("VERSION = 'current'\n{SERVER}")).await;
    let opened = bed.platform.open_workspace(&spec(&user, &repl)).await;
    assert!(opened.unwrap().created);
    served(&bed, &repl, "current").await;
    // Positive control: what is looked for afterwards is found now.
    let there = left(&bed, &user, &repl).await;
    for kind in ["Deployment", "Service", "Ingress", "Pod"] {
        assert!(there.iter().any(|one| one.starts_with(kind)), "{there:?}");
    }
    bed.platform.drop_repl(&repl).await.unwrap();
    eventually("everything is gone", || async {
        let left = left(&bed, &user, &repl).await;
        println!("left: {left:?}");
        left.is_empty()
    })
    .await;
    assert!(bed.store.has_current(&repl, "main.py").await.unwrap());
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn two_servers_make_a_workspace_once_and_a_dead_ones_work_is_finished() {
    let (one, other) = (Bed::start().await, Bed::start().await);
    let user = one.user("twice");
    let repl = one.repl(&user);
    put(&one, &repl, &format!("VERSION = 'current'\n{SERVER}")).await;
    let spec = spec(&user, &repl);
    let (first, second) = tokio::join!(
        one.platform.open_workspace(&spec),
        other.platform.open_workspace(&spec)
    );
    assert_ne!(first.unwrap().created, second.unwrap().created);
    served(&other, &repl, "current").await;
    // As a server leaves it that dies between its record and the objects.
    let deployments: Api<k8s_openapi::api::apps::v1::Deployment> =
        Api::namespaced(one.client.clone(), &user.namespace());
    let params = kube::api::DeleteParams::background();
    deployments.delete(repl.as_str(), &params).await.unwrap();
    eventually("the Deployment is made again", || async {
        one.platform.open_workspace(&spec).await.unwrap();
        deployments.get_opt(repl.as_str()).await.unwrap().is_some()
    })
    .await;
    served(&one, &repl, "current").await;
    one.platform.drop_repl(&repl).await.unwrap();
    one.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn an_empty_bucket_is_told_in_the_words_of_what_was_to_bring_the_files() {
    let bed = Bed::start().await;
    let user = bed.user("empty");
    let repl = bed.repl(&user);
    let opened = bed.platform.open_workspace(&spec(&user, &repl)).await;
    assert!(opened.unwrap().created);
    let status = || async {
        let repls = bed.platform.repls().await.unwrap();
        repls.into_iter().find(|one| one.repl_id == repl).unwrap()
    };
    eventually("the cause is told", || async {
        let status = status().await;
        let told = status.last_error.unwrap_or_default();
        told.contains("There is no whole code at s3://") && status.state == ReplState::Crashed
    })
    .await;
    let dialled = bed.platform.dial(&repl).await;
    assert!(matches!(dialled, Err(PlatformError::Unavailable(_))));
    // Its user puts files there, and the cluster's next try finds them.
    put(&bed, &repl, &format!("VERSION = 'late'\n{SERVER}")).await;
    served(&bed, &repl, "late").await;
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn links_empty_folders_and_execute_bits_come_back() {
    let bed = Bed::start().await;
    let user = bed.user("extras");
    let repl = bed.repl(&user);
    put(&bed, &repl, &format!("VERSION = 'current'\n{SERVER}")).await;
    let path = |name: &str| RelativePath::try_from(name.to_owned()).unwrap();
    let script = b"#!/bin/sh\necho ran-$((40+2))\n".to_vec();
    let name = path("bin/run");
    let run = bed.store.put_current(&repl, &name, script);
    run.await.unwrap();
    let extras = json!({ "folders": ["empty/deep"], "links": { "inside": "bin/run" }, "executable": ["bin/run"] });
    let name = path(gantry::model::WORKSPACE_EXTRAS);
    let extras = bed
        .store
        .put_current(&repl, &name, extras.to_string().into_bytes());
    extras.await.unwrap();
    bed.platform
        .open_workspace(&spec(&user, &repl))
        .await
        .unwrap();
    served(&bed, &repl, "current").await;
    let at = format!("/?ticket={}", ticket(&bed, &repl).await);
    eventually("the ingress knows it", || async {
        through_the_ingress(&repl, &at).await.is_ok()
    })
    .await;
    let mut socket = through_the_ingress(&repl, &at).await.unwrap();
    let open = json!({ "id": 1, "op": "terminal.open", "terminal": "one" });
    say(&mut socket, open).await;
    let look = "./inside; test -d empty/deep && echo emp''ty; ls -a | grep -c gantry-works''pace\n";
    socket.send(typed(look)).await.unwrap();
    sees(&mut socket, "ran-42").await;
    sees(&mut socket, "empty").await;
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_forgotten_repl_leaves_no_secrets_and_no_name() {
    let bed = Bed::start().await;
    let user = bed.user("forgotten");
    let repl = bed.repl(&user);
    put(&bed, &repl, &format!("VERSION = 'current'\n{SERVER}")).await;
    bed.platform
        .open_workspace(&spec(&user, &repl))
        .await
        .unwrap();
    served(&bed, &repl, "current").await;
    let secret = gantry::model::SecretText::from("hush".to_owned());
    let change = gantry::model::VariablesChange {
        env: Some(BTreeMap::from([("COLOUR".to_owned(), "red".to_owned())])),
        secrets: Some(BTreeMap::from([("TOKEN".to_owned(), Some(secret))])),
    };
    let change = gantry::model::ReplChange::Variables(change);
    bed.platform.configure(&repl, &change).await.unwrap();
    let kept = async || {
        let discovery = Discovery::new(bed.client.clone()).run().await.unwrap();
        let core = discovery
            .groups()
            .find(|group| group.name().is_empty())
            .unwrap();
        let (secrets, _) = core.recommended_kind("Secret").unwrap();
        let api: Api<DynamicObject> = Api::all_with(bed.client.clone(), &secrets);
        let labels = format!("gantry.dev/repl={repl}");
        let found = api
            .list(&ListParams::default().labels(&labels))
            .await
            .unwrap();
        found.items.len()
    };
    assert!(kept().await > 0, "the control: they are there");
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.platform.delete_data(&repl).await.unwrap();
    bed.platform.forget(&repl).await.unwrap();
    assert_eq!(kept().await, 0);
    assert_eq!(bed.platform.owner(&repl).await.unwrap(), None);
    bed.forget(user.as_str()).await;
}

type Socket = tokio_tungstenite::WebSocketStream<tokio::net::TcpStream>;

/// A WebSocket to the repl's runner, as a browser opens it; or the HTTP status that refused it.
async fn through_the_ingress(repl: &ReplId, path: &str) -> Result<Socket, u16> {
    let address = std::env::var("TESTBED_INGRESS").unwrap();
    let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let url = format!("ws://{repl}.localhost{path}");
    match tokio_tungstenite::client_async(url, stream).await {
        Ok((socket, _)) => Ok(socket),
        Err(Error::Http(response)) => Err(response.status().as_u16()),
        Err(error) => panic!("{error}"),
    }
}

async fn ticket(bed: &Bed, repl: &ReplId) -> String {
    let key = bed.platform.ticket_key(repl).await.unwrap();
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    key.issue(repl, now.as_secs() + 60)
}

async fn say(socket: &mut Socket, request: serde_json::Value) {
    socket
        .send(Message::text(request.to_string()))
        .await
        .unwrap();
}

/// Until the terminal has shown this.
async fn sees(socket: &mut Socket, text: &str) {
    let mut shown = Vec::new();
    let seeing = async {
        while !String::from_utf8_lossy(&shown).contains(text) {
            match socket.next().await {
                Some(Ok(Message::Binary(data))) => {
                    shown.extend(&data[1 + usize::from(data[0])..]);
                }
                Some(Ok(_)) => {}
                other => panic!("the connection ended: {other:?}"),
            }
        }
    };
    let seen = tokio::time::timeout(PATIENCE, seeing).await;
    assert!(seen.is_ok(), "{text:?} is not shown");
}

fn typed(text: &str) -> Message {
    let mut frame = b"\x03one".to_vec();
    frame.extend(text.as_bytes());
    Message::binary(frame)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_terminal_is_reached_through_the_ingress_with_a_ticket_of_its_repl() {
    let bed = Bed::start().await;
    let user = bed.user("terminal");
    let repl = bed.repl(&user);
    put(&bed, &repl, &format!("VERSION = 'current'\n{SERVER}")).await;
    bed.platform
        .open_workspace(&spec(&user, &repl))
        .await
        .unwrap();
    served(&bed, &repl, "current").await;
    let good = format!("/?ticket={}", ticket(&bed, &repl).await);
    eventually("the ingress knows it", || async {
        through_the_ingress(&repl, &good).await.is_ok()
    })
    .await;
    let key = bed.platform.ticket_key(&repl).await.unwrap();
    let other = key.issue(&"other".parse().unwrap(), u64::MAX);
    let late = key.issue(&repl, 1);
    for bad in [
        "/",
        "/?ticket=",
        &format!("/?ticket={other}"),
        &format!("/?ticket={late}"),
    ] {
        assert_eq!(
            through_the_ingress(&repl, bad).await.err(),
            Some(401),
            "{bad}"
        );
    }
    let mut socket = through_the_ingress(&repl, &good).await.unwrap();
    let open = json!({ "id": 1, "op": "terminal.open", "terminal": "one" });
    say(&mut socket, open.clone()).await;
    // No variable and no process gives the store's credentials or the runner's key away. One of Gantry's
    // own is there: the way to packages, on loopback.
    let look = "echo vars-$(env | grep -e AWS -e GANTRY | \
                grep -vc '^GANTRY_PACKAGE_PROXY=http://127.0.0.1:[0-9]*$'); \
                cat /proc/1/environ; echo lo'oked'\n";
    socket.send(typed(look)).await.unwrap();
    sees(&mut socket, "vars-0").await;
    sees(&mut socket, "Permission denied").await;
    let edit = json!({ "id": 2, "op": "files.write", "path": "edited.txt", "text": "kept" });
    say(&mut socket, edit).await;
    drop(socket);
    let mut socket = through_the_ingress(&repl, &good).await.unwrap();
    say(&mut socket, open).await;
    sees(&mut socket, "looked").await;
    echo(&mut socket).await;
    // What Gantry's own way to it gives: the same files.
    let mut stream = bed.platform.dial_runner(&repl).await.unwrap();
    let ticket = ticket(&bed, &repl).await;
    let request = format!(
        "GET /files/edited.txt HTTP/1.0\r\nHost: x\r\nAuthorization: Bearer {ticket}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.0 200") && answer.ends_with("kept"),
        "{answer}"
    );
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

/// How long a key press takes to be shown, at most, in the middle (issue: 5 ms above a local terminal,
/// whose kernel takes microseconds).
const ECHO: Duration = Duration::from_millis(5);

async fn echo(socket: &mut Socket) {
    socket.send(typed("cat\n")).await.unwrap();
    sees(socket, "cat\r\n").await;
    let mut took = Vec::new();
    for _ in 0..200 {
        let pressed = Instant::now();
        socket.send(typed("k")).await.unwrap();
        sees(socket, "k").await;
        took.push(pressed.elapsed());
    }
    took.sort();
    let (middle, late) = (took[took.len() / 2], took[took.len() * 95 / 100]);
    println!("key press to echo through the ingress: p50 {middle:?}, p95 {late:?}");
    if std::env::var_os("GANTRY_TEST_FULL").is_some() {
        assert!(middle <= ECHO, "{middle:?}");
    }
}

/// What the ingress answers for the repl's program.
async fn answer(repl: &ReplId) -> (u16, String) {
    answer_to(repl, "/").await
}

async fn answer_to(repl: &ReplId, path: &str) -> (u16, String) {
    let address = std::env::var("TESTBED_INGRESS").unwrap();
    let host = format!("{repl}.apps.localhost");
    let request = reqwest::Client::new().get(format!("http://{address}{path}"));
    match request.header("host", host).send().await {
        Ok(answer) => (
            answer.status().as_u16(),
            answer.text().await.unwrap_or_default(),
        ),
        Err(_) => (0, String::new()),
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn before_a_program_listens_and_after_it_ended_a_page_shows_what_happens() {
    let bed = Bed::start().await;
    let user = bed.user("page");
    let repl = bed.repl(&user);
    let code = format!(
        "print('warming <up>', flush=True)
import os, time
while not os.path.exists('go'): time.sleep(0.05)
VERSION = 'served'
import threading
def leave():
    while os.path.exists('go'): time.sleep(0.05)
    print('leaving', flush=True)
    os._exit(4)
threading.Thread(target=leave).start()
{SERVER}"
    );
    put(&bed, &repl, &code).await;
    bed.platform
        .open_workspace(&spec(&user, &repl))
        .await
        .unwrap();
    let path = format!("/?ticket={}", ticket(&bed, &repl).await);
    let shows = async |status: u16, text: &str| {
        eventually(text, || async {
            let (found, page) = answer_to(&repl, &path).await;
            found == status && page.contains(text)
        })
        .await;
    };
    shows(503, "warming &lt;up&gt;").await;
    // Strangers do not read what it writes.
    let (status, page) = answer(&repl).await;
    assert!(status == 503 && !page.contains("warming"), "{page}");
    let mut socket = through_the_ingress(&repl, &path).await.unwrap();
    let write = json!({ "id": 1, "op": "files.write", "path": "go", "text": "" });
    say(&mut socket, write).await;
    shows(200, "served").await;
    let delete = json!({ "id": 2, "op": "files.delete", "path": "go" });
    say(&mut socket, delete).await;
    shows(502, "leaving").await;
    shows(502, "exit code 4").await;
    let (status, page) = answer(&repl).await;
    assert!(status == 502 && !page.contains("leaving"), "{page}");
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}
