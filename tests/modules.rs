//! Python modules as gRPC services, over HTTP and the command line: one suite for both platforms. On a cluster it
//! needs the bed: `eval "$(scripts/testbed env)"`, then `cargo test --test modules -- --ignored`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "modules/clients.rs"]
mod clients;
#[path = "modules/cluster.rs"]
mod cluster;
#[path = "protocol/server.rs"]
#[allow(dead_code, reason = "shared with other tests, which use the rest")]
mod server;

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use server::{PATIENCE, Server};

/// The first pod of a server waits for pip: some megabytes over a slow line.
const INSTALL_PATIENCE: Duration = Duration::from_secs(300);

/// Everything in a namespace that a module may have there.
const MADE: &str = "deployments,services,ingresses,hpa,secrets";

/// A server, and a key of a user's.
struct Modules {
    server: Server,
    user: String,
    key: String,
}

impl Modules {
    async fn start() -> Self {
        Self::with(&[]).await
    }

    async fn with(variables: &[(&str, &str)]) -> Self {
        Self::of("ann", variables).await
    }

    async fn of(user: &str, variables: &[(&str, &str)]) -> Self {
        let server = Server::start_as(0, variables);
        let (_, key) = server.user(user).await;
        Self {
            server,
            user: user.to_owned(),
            key,
        }
    }

    async fn ask(&self, request: reqwest::RequestBuilder) -> (u16, Value) {
        let request = request.header("x-api-key", &self.key);
        let answer = request.timeout(INSTALL_PATIENCE).send().await.unwrap();
        let status = answer.status().as_u16();
        (status, answer.json().await.unwrap())
    }

    /// Asked again while its packages are being installed: that takes longer than an answer may.
    async fn create(&self, module: &str, body: Value) -> (u16, Value) {
        let begun = Instant::now();
        loop {
            let path = format!("/create_pod/{module}");
            let (status, told) = self.ask(self.server.post(&path).json(&body)).await;
            let installing = status == 503 && told["code"] == "module_starting";
            if !installing || begun.elapsed() > INSTALL_PATIENCE {
                return (status, told);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn created(&self, module: &str) {
        let (status, told) = self.create(module, json!({})).await;
        assert_eq!(status, 200, "{module}: {told}");
        assert_eq!(told["state"], "running", "{told}");
    }

    async fn run(&self, module: &str, method: &str, body: &Value) -> (u16, Value) {
        let path = format!("/run_module?module_name={module}&method_name={method}");
        self.ask(self.server.post(&path).json(body)).await
    }

    async fn result(&self, module: &str, method: &str, args: Value) -> Value {
        let body = json!({ "args": args, "kwargs": {} });
        let (status, told) = self.run(module, method, &body).await;
        assert_eq!(status, 200, "{module}.{method}: {told}");
        told
    }

    /// Refused with this status and code, a cause and a remedy; the module takes the next call.
    async fn refused(&self, module: &str, method: &str, body: Value, as_: (u16, &str)) -> Value {
        let (status, told) = self.run(module, method, &body).await;
        let code = told["code"].as_str().unwrap_or_default();
        assert_eq!((status, code), as_, "{module}.{method}: {told}");
        for part in ["detail", "cause", "remediation"] {
            assert!(!told[part].as_str().unwrap().is_empty(), "{part}: {told}");
        }
        told
    }

    async fn answers(&self) {
        assert_eq!(
            self.result("math", "sqrt", json!([16])).await,
            json!({ "result": 4.0 })
        );
    }
}

#[tokio::test]
async fn functions_are_called_and_every_failure_has_its_words() {
    let modules = Modules::start().await;
    every_row(&modules).await;
    // Its port is in a sandbox: there is no way past the server.
    let (_, told) = modules.create("math", json!({})).await;
    assert_eq!((told.get("authority"), told.get("token")), (None, None));
}

#[tokio::test]
async fn packages_are_installed_and_modules_come_back_with_the_server() {
    packages_and_restart(&mut Modules::with(&[("GANTRY_ALLOW_PACKAGES", "true")]).await).await;
}

#[tokio::test]
async fn a_module_that_nobody_calls_is_stopped_until_the_next_call() {
    stopped_when_idle(&Modules::with(&[IDLE]).await).await;
}

#[tokio::test]
async fn a_users_calls_are_bounded_by_how_many_there_are_at_a_time() {
    let modules = Modules::with(&[("GANTRY_MAX_CALLS", "2")]).await;
    modules.created("time").await;
    let body = json!({ "args": [1.5] });
    let calls = (0..3).map(|_| modules.run("time", "sleep", &body));
    let mut told: Vec<(u16, Value)> = futures_util::future::join_all(calls).await;
    told.sort_by_key(|(status, _)| *status);
    let statuses: Vec<u16> = told.iter().map(|(status, _)| *status).collect();
    assert_eq!(statuses, [200, 200, 429], "{told:?}");
    assert_eq!(told[2].1["code"], "too_many_calls");
    let auto = json!({ "max": 2, "cpu_percent": 70 });
    let scale = modules.server.post("/modules/time/scale").json(&auto);
    let (status, told) = modules.ask(scale).await;
    let code = told["code"].as_str();
    assert_eq!(
        (status, code),
        (422, Some("autoscaling_not_here")),
        "{told}"
    );
}

/// A call that is under way when its module's replicas end has its answer.
#[tokio::test]
async fn calls_under_way_outlive_their_replica() {
    let mut modules = Modules::with(&[("GANTRY_ALLOW_PACKAGES", "true")]).await;
    let [before, after] =
        ["2.0.0", "2.1.0"].map(|v| json!({ "packages": [format!("iniconfig=={v}")] }));
    // A user's modules share what is installed: the change below waits for no installation.
    for (module, packages) in [("math", &after), ("time", &before)] {
        let (status, told) = modules.create(module, packages.clone()).await;
        assert_eq!(status, 200, "{told}");
    }
    let asked = json!({ "args": [3] });
    let call = || modules.run("time", "sleep", &asked);
    // Long enough for the call to begin, and much less than it takes.
    let begun = || tokio::time::sleep(Duration::from_millis(800));

    let change = async {
        begun().await;
        modules.create("time", after).await
    };
    let ((status, told), changed) = tokio::join!(call(), change);
    assert_eq!(status, 200, "during a change of packages: {told}");
    assert_eq!(changed.0, 200, "{changed:?}");

    let remove = async {
        begun().await;
        modules
            .ask(client().delete(modules.server.url("/pod/time")))
            .await
    };
    let ((status, told), removed) = tokio::join!(call(), remove);
    assert_eq!(status, 200, "during a removal: {told}");
    assert_eq!(removed.0, 200, "{removed:?}");

    modules.created("time").await;
    let url = modules
        .server
        .url("/run_module?module_name=time&method_name=sleep");
    let request = client().post(url).header("x-api-key", &modules.key);
    let call = tokio::spawn(request.json(&asked).send());
    begun().await;
    let ended = tokio::task::spawn_blocking(move || modules.server.terminate());
    let answer = call.await.unwrap().unwrap();
    let status = answer.status().as_u16();
    assert_eq!(
        status,
        200,
        "at the server's end: {}",
        answer.text().await.unwrap()
    );
    assert!(ended.await.unwrap().success());
}

/// The shortest that there is.
const IDLE: (&str, &str) = ("GANTRY_MODULE_IDLE", "10s");

async fn stopped_when_idle(modules: &Modules) {
    modules.created("math").await;
    modules.answers().await;
    let begun = Instant::now();
    loop {
        let (_, told) = modules.ask(modules.server.get("/modules")).await;
        let one = &told["modules"][0];
        // A busy cluster takes a moment to end the pod of what is stopped.
        if one["state"] == "stopped" && one["ready"] == 0 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{told}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(begun.elapsed() > Duration::from_secs(8), "too early");
    modules.answers().await;
    let (_, told) = modules.ask(modules.server.get("/modules")).await;
    assert_ne!(told["modules"][0]["state"], "stopped", "{told}");
}

async fn every_row(modules: &Modules) {
    let (status, told) = modules.create("math", json!({})).await;
    assert_eq!((status, &told["podCreated"]), (200, &json!(true)), "{told}");
    let (_, told) = modules.create("math", json!({})).await;
    assert_eq!(told["podCreated"], false, "again it is the same pod");
    modules.answers().await;
    what_is_called_wrongly_is_refused(modules).await;
    what_a_function_does_to_itself_stays_with_it(modules).await;
    what_is_yielded_comes_as_events(modules).await;
    modules_are_listed_described_scaled_and_removed(modules).await;
    the_command_line_does_the_same(modules).await;
}

async fn what_is_called_wrongly_is_refused(modules: &Modules) {
    let none = || json!({});
    let with = |args: Value| json!({ "args": args });
    modules
        .refused("json", "dumps", none(), (404, "module_not_found"))
        .await;
    let (status, told) = modules.create("no_such_module", none()).await;
    assert_eq!(
        (status, told["code"].as_str()),
        (404, Some("module_not_found")),
        "{told}"
    );
    let (status, told) = modules.create("not-a-name", none()).await;
    assert_eq!(
        (status, told["field"].as_str()),
        (400, Some("module")),
        "{told}"
    );
    let refused = modules
        .refused("math", "sqr", none(), (404, "method_not_found"))
        .await;
    assert!(
        refused["cause"].as_str().unwrap().contains("sqrt"),
        "{refused}"
    );
    modules
        .refused("math", "__loader__.name", none(), (403, "method_private"))
        .await;
    modules
        .refused("math", "pi", none(), (422, "method_not_callable"))
        .await;
    let named = json!({ "args": [1], "kwargs": { "y": 2 } });
    modules
        .refused("math", "sqrt", named, (422, "arguments_wrong"))
        .await;
    let raised = modules
        .refused("math", "sqrt", with(json!([-1])), (422, "function_raised"))
        .await;
    assert_eq!(raised["exception"]["type"], "ValueError", "{raised}");
    assert!(
        raised["exception"]["traceback"]
            .as_str()
            .unwrap()
            .contains("ValueError"),
        "{raised}"
    );
    for (body, field) in [
        (json!({ "args": {} }), "args"),
        (json!({ "kwargs": [] }), "kwargs"),
        (json!({ "timeout_ms": 60_001 }), "timeout_ms"),
        (json!({ "argument": [] }), "argument"),
    ] {
        let (status, told) = modules.run("math", "sqrt", &body).await;
        assert_eq!(
            (status, told["field"].as_str()),
            (400, Some(field)),
            "{told}"
        );
    }
    let path = "/run_module?module_name=math&method_name=sqrt";
    for body in [
        "not json".to_owned(),
        format!("{{\"args\":{}", "[".repeat(100_000)),
    ] {
        let (status, told) = modules.ask(modules.server.post(path).body(body)).await;
        assert_eq!(status, 400, "{told}");
    }
    let deep = format!("{{\"args\":{}1{}}}", "[".repeat(500), "]".repeat(500));
    let (status, told) = modules.ask(modules.server.post(path).body(deep)).await;
    assert_eq!(
        (status, told["field"].as_str()),
        (400, Some("args")),
        "{told}"
    );
    let large = format!("{{\"args\":[\"{}\"]}}", "x".repeat(9 << 20));
    let (status, told) = modules.ask(modules.server.post(path).body(large)).await;
    assert_eq!(
        (status, told["code"].as_str()),
        (413, Some("body_too_large")),
        "{told}"
    );
    modules.answers().await;
}

async fn what_a_function_does_to_itself_stays_with_it(modules: &Modules) {
    let with = |args: Value| json!({ "args": args });
    for module in ["ctypes", "time", "operator", "builtins", "threading"] {
        modules.created(module).await;
    }
    let crashed = modules
        .refused(
            "ctypes",
            "string_at",
            with(json!([0])),
            (422, "call_crashed"),
        )
        .await;
    assert_eq!(crashed["exception"]["type"], "SIGSEGV", "{crashed}");
    assert_eq!(
        modules.result("ctypes", "get_errno", json!([])).await,
        json!({ "result": 0 })
    );
    let begun = Instant::now();
    let body = json!({ "args": [60], "timeout_ms": 300 });
    modules
        .refused("time", "sleep", body, (504, "call_timeout"))
        .await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(modules.result("time", "time", json!([])).await["result"].is_f64());
    let large = json!(["x", 100 << 20]);
    modules
        .refused("operator", "mul", with(large), (422, "result_too_large"))
        .await;
    assert_eq!(
        modules.result("operator", "mul", json!(["x", 3])).await,
        json!({ "result": "xxx" })
    );
    let huge = json!([10_000_000_000_i64]);
    modules
        .refused(
            "builtins",
            "bytearray",
            with(huge),
            (422, "call_out_of_memory"),
        )
        .await;
    assert_eq!(
        modules.result("builtins", "abs", json!([-1])).await,
        json!({ "result": 1 })
    );
    let lock = modules
        .refused(
            "threading",
            "Lock",
            with(json!([])),
            (422, "result_not_json"),
        )
        .await;
    assert_eq!(lock["exception"]["type"], "_thread.lock", "{lock}");
    assert!(modules.result("threading", "active_count", json!([])).await["result"].is_u64());
}

async fn what_is_yielded_comes_as_events(modules: &Modules) {
    modules.created("itertools").await;
    let path = "/run_module?module_name=itertools&method_name=permutations";
    let request = modules.server.post(path).header("x-api-key", &modules.key);
    let answer = request
        .header("accept", "text/event-stream")
        .json(&json!({ "args": [[1, 2, 3]] }))
        .send()
        .await
        .unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let text = answer.text().await.unwrap();
    assert_eq!(text.matches("event: item\n").count(), 6, "{text}");
    assert!(text.contains("event: item\ndata: [1,2,3]\n"), "{text}");
    assert!(
        text.ends_with("event: result\ndata: {\"result\":null}\n\n"),
        "{text}"
    );
    let path = "/run_module?module_name=itertools&method_name=no_such";
    let request = modules.server.post(path).header("x-api-key", &modules.key);
    let answer = request
        .header("accept", "text/event-stream")
        .json(&json!({}))
        .send()
        .await
        .unwrap();
    let text = answer.text().await.unwrap();
    assert!(
        text.contains("event: error\ndata: {") && text.contains("method_not_found"),
        "{text}"
    );
}

async fn modules_are_listed_described_scaled_and_removed(modules: &Modules) {
    let (_, told) = modules.ask(modules.server.get("/modules/math")).await;
    let functions = told["functions"].as_array().unwrap();
    let sqrt = functions.iter().find(|one| one["name"] == "sqrt").unwrap();
    assert_eq!(sqrt["signature"], "(x, /)");
    assert!(
        sqrt["doc"].as_str().unwrap().contains("square root"),
        "{sqrt}"
    );
    let scale = modules
        .server
        .post("/modules/math/scale")
        .json(&json!({ "replicas": 2 }));
    let (status, told) = modules.ask(scale).await;
    assert_eq!((status, &told["replicas"]), (200, &json!(2)), "{told}");
    let begun = Instant::now();
    loop {
        let (_, told) = modules.ask(modules.server.get("/modules")).await;
        let all = told["modules"].as_array().unwrap();
        let math = all.iter().find(|one| one["module"] == "math").unwrap();
        if math["ready"] == 2 {
            assert_eq!(
                (&math["state"], &math["user_id"]),
                (&json!("running"), &json!(modules.user))
            );
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{told}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for _ in 0..4 {
        modules.answers().await;
    }
    // Nobody else's.
    let bob = format!("{}b", modules.user);
    let (_, other) = modules.server.user(&bob).await;
    let request = modules.server.get("/modules").header("x-api-key", &other);
    let told: Value = request.send().await.unwrap().json().await.unwrap();
    assert_eq!(told, json!({ "modules": [] }));
    let path = format!(
        "/run_module?module_name=math&method_name=sqrt&userId={}",
        modules.user
    );
    let request = modules.server.post(&path).header("x-api-key", &other);
    assert_eq!(request.json(&json!({})).send().await.unwrap().status(), 403);
    let remove = || modules.ask(client().delete(modules.server.url("/pod/time")));
    let (status, told) = remove().await;
    assert_eq!(
        (status, told),
        (200, json!({ "success": true, "module": "time" }))
    );
    assert_eq!(remove().await.0, 404);
    modules
        .refused("time", "time", json!({}), (404, "module_not_found"))
        .await;
}

fn client() -> reqwest::Client {
    server::client()
}

async fn the_command_line_does_the_same(modules: &Modules) {
    let gantry = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gantry"));
        command
            .arg("module")
            .args(args)
            .env("GANTRY_SERVER", modules.server.url(""))
            .env("API_KEY", &modules.key);
        tokio::task::spawn_blocking(move || {
            let output = command.output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            (output.status.code(), text, error)
        })
    };
    let (code, text, error) = gantry(&["create", "statistics"]).await.unwrap();
    assert_eq!(
        (code, &*text),
        (Some(0), "statistics created 1/1\n"),
        "{error}"
    );
    let (_, text, _) = gantry(&["ls"]).await.unwrap();
    assert!(
        text.contains("statistics") && text.contains("running"),
        "{text}"
    );
    let (_, text, _) = gantry(&["ls", "statistics"]).await.unwrap();
    assert!(text.contains("median(data)"), "{text}");
    let (code, text, error) = gantry(&["call", "statistics.mean", "1", "2", "6"])
        .await
        .unwrap();
    assert_eq!((code, &*text), (Some(0), "3\n"), "{error}");
    assert!(error.contains("one list"), "{error}");
    let (code, _, error) = gantry(&["call", "math.sqrt", "-1"]).await.unwrap();
    assert_eq!(code, Some(1));
    assert!(error.contains("ValueError"), "{error}");
    let (code, _, _) = gantry(&["rm", "statistics"]).await.unwrap();
    assert_eq!(code, Some(0));
}

async fn packages_and_restart(modules: &mut Modules) {
    let array = json!([16, 20, 24]);
    modules.created("numpy").await;
    assert_eq!(
        modules.result("numpy", "array", array.clone()).await,
        json!({ "result": [16, 20, 24], "called_with": "list" })
    );
    let packages = json!({ "packages": ["iniconfig==2.0.0"] });
    let (status, told) = modules.create("iniconfig", packages).await;
    assert_eq!(status, 200, "{told}");
    assert_eq!(told["packages"], json!(["iniconfig==2.0.0"]));
    let packages = json!({ "packages": ["iniconfig==0.0.0"] });
    let (status, told) = modules.create("iniconfig", packages).await;
    assert_eq!(
        (status, told["code"].as_str()),
        (422, Some("packages_not_installed")),
        "{told}"
    );
    assert!(
        told["cause"].as_str().unwrap().contains("iniconfig==0.0.0"),
        "{told}"
    );
    let packages = json!({ "packages": ["iniconfig", "--index-url=x"] });
    let (status, told) = modules.create("iniconfig", packages).await;
    assert_eq!(
        (status, told["field"].as_str()),
        (400, Some("packages[0]")),
        "{told}"
    );
    modules.server.restart();
    let begun = Instant::now();
    loop {
        let body = json!({ "args": array });
        let (status, told) = modules.run("numpy", "array", &body).await;
        if status == 200 {
            break;
        }
        assert_eq!(status, 503, "{told}");
        assert!(begun.elapsed() < PATIENCE, "{told}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
