//! The example clients in `clients/`, which call modules through the bed's ingress controller and without Gantry.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::MADE;
use super::cluster::OnTheBed;
use super::server::PATIENCE;

/// One of the examples, and how it is started.
struct Client(&'static str, Vec<String>);

/// Where and as whom a client calls.
struct Way {
    ingress: String,
    authority: String,
    token: String,
}

impl Way {
    fn of(created: &Value) -> Self {
        let text = |name: &str| created[name].as_str().unwrap_or_default().to_owned();
        let way = Self {
            ingress: std::env::var("TESTBED_INGRESS").expect("the bed's variables are not set"),
            authority: text("authority"),
            token: text("token"),
        };
        assert!(
            !way.authority.is_empty() && way.token.len() > 40,
            "{created}"
        );
        way
    }

    fn with_token(&self, token: &str) -> Self {
        Self {
            ingress: self.ingress.clone(),
            authority: self.authority.clone(),
            token: token.to_owned(),
        }
    }
}

/// Both examples, with what they need installed.
fn clients() -> [Client; 2] {
    let told = Command::new("python3")
        .args(["tests/modules/run.py", "--environment"])
        .output()
        .unwrap();
    assert!(told.status.success(), "{told:?}");
    let python = String::from_utf8(told.stdout).unwrap().trim().to_owned();
    let installed = Command::new("npm")
        .args(["install", "--prefix", "tests/modules/clients"])
        .args(["--no-audit", "--no-fund", "--silent"])
        // By itself it tries for ten minutes before it says what is wrong.
        .args(["--fetch-retries", "1", "--fetch-timeout", "60000"])
        .output()
        .unwrap();
    assert!(installed.status.success(), "{installed:?}");
    let words = |program: &str, file: &str| vec![program.to_owned(), file.to_owned()];
    [
        Client("Python", words(&python, "tests/modules/clients/client.py")),
        Client("Node.js", words("node", "tests/modules/clients/client.mjs")),
    ]
}

impl Client {
    fn command(&self, way: &Way, arguments: &[&str]) -> Command {
        let Client(_, words) = self;
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .args(["--plain", &way.ingress, &way.authority])
            .args(arguments)
            .env("MODULE_TOKEN", &way.token);
        command
    }

    /// What it prints, or what it complains of.
    fn says(&self, way: &Way, arguments: &[&str]) -> Result<String, String> {
        let output = self.command(way, arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        match output.status.success() {
            true => Ok(text(output.stdout)),
            false => Err(text(output.stderr)),
        }
    }

    /// The same, asked again until the ingress controller knows the host and pods answer.
    async fn tells(&self, way: &Way, arguments: &[&str]) -> String {
        let begun = Instant::now();
        loop {
            match self.says(way, arguments) {
                Ok(said) => return said,
                Err(why) => {
                    let coming = ["UNIMPLEMENTED", "UNAVAILABLE"];
                    let comes = coming.iter().any(|code| why.contains(code));
                    let waits = comes && begun.elapsed() < PATIENCE;
                    assert!(waits, "{} {arguments:?}: {why}", self.0);
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

#[tokio::test]
#[ignore = "needs a cluster"]
async fn clients_with_the_token_call_a_module_through_the_ingress_and_no_others() {
    let clients = clients();
    let bed = OnTheBed::start("direct", &[]).await;
    let (_, created) = bed.0.create("math", json!({})).await;
    let math = Way::of(&created);
    let (_, created) = bed.0.create("builtins", json!({})).await;
    let builtins = Way::of(&created);
    for client in &clients {
        let said = client.tells(&math, &["call", "sqrt", "16"]).await;
        assert_eq!(said.trim().parse::<f64>(), Ok(4.0), "{}", client.0);
        let said = client.tells(&math, &["describe"]).await;
        assert!(said.contains("sqrt(x, /)\n"), "{}: {said}", client.0);
        let failed = client.says(&math, &["call", "nothing"]).unwrap_err();
        assert!(
            failed.contains("METHOD_NOT_FOUND"),
            "{}: {failed}",
            client.0
        );
        a_stream_comes_as_it_is_made(client, &builtins).await;
        for wrong in ["", "wrong", &builtins.token] {
            let way = math.with_token(wrong);
            for asked in [
                &["call", "sqrt", "16"][..],
                &["stream", "sqrt", "16"],
                &["describe"],
            ] {
                let refused = client.says(&way, asked).unwrap_err();
                let named = refused.contains("UNAUTHENTICATED");
                assert!(named, "{} {asked:?} with {wrong:?}: {refused}", client.0);
            }
        }
    }
    let [python, _] = &clients;
    let said = python.tells(&math, &["services"]).await;
    assert!(said.contains("gantry.module.v1.ModuleService"), "{said}");
    let refused = python.says(&math.with_token("wrong"), &["services"]);
    assert!(refused.unwrap_err().contains("UNAUTHENTICATED"));
    the_token_is_told_to_who_creates_the_module_and_to_nobody_else(&bed, &math).await;
    what_an_earlier_version_made_goes_on(&bed, python).await;
    removed_and_made_again_it_has_another_token(&bed, python, &math).await;
}

/// The first value is there while the next ones are being made.
async fn a_stream_comes_as_it_is_made(client: &Client, way: &Way) {
    let values = r#""(n for n in range(4) if not __import__('time').sleep(1))""#;
    client.tells(way, &["describe"]).await;
    let mut process = client
        .command(way, &["stream", "eval", values])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let told: Vec<(Instant, String)> = lines.map(|line| (Instant::now(), line.unwrap())).collect();
    assert!(process.wait().unwrap().success(), "{}: {told:?}", client.0);
    let said: Vec<&str> = told.iter().map(|(_, line)| line.as_str()).collect();
    let expected = ["item 0", "item 1", "item 2", "item 3", "end null"];
    assert_eq!(said, expected, "{}", client.0);
    let ahead = told[4].0.duration_since(told[0].0);
    assert!(ahead > Duration::from_secs(2), "{}: {ahead:?}", client.0);
}

async fn the_token_is_told_to_who_creates_the_module_and_to_nobody_else(
    bed: &OnTheBed,
    math: &Way,
) {
    let (_, again) = bed.0.create("math", json!({})).await;
    let again = Way::of(&again);
    assert_eq!(
        (&again.authority, &again.token),
        (&math.authority, &math.token)
    );
    let (_, listed) = bed.0.ask(bed.0.server.get("/modules")).await;
    let all = listed["modules"].as_array().unwrap();
    let mut hosts = all.iter().map(|one| &one["authority"]);
    assert!(hosts.any(|host| *host == *math.authority), "{listed}");
    assert!(!listed.to_string().contains(&math.token), "{listed}");
    let pod = bed.kubectl(&["get", "deployment,pod", "-o", "yaml"]);
    assert!(!pod.contains(&math.token));
}

/// Without host and token a module is called by way of the server, and has both when it is created again.
async fn what_an_earlier_version_made_goes_on(bed: &OnTheBed, client: &Client) {
    bed.kubectl(&["set", "env", "deployment/module-math", "MODULE_TOKEN-"]);
    bed.kubectl(&[
        "annotate",
        "deployment/module-math",
        "gantry.dev/authority-",
    ]);
    bed.kubectl(&["delete", "ingress/module-math", "secret/module-math-token"]);
    bed.kubectl(&[
        "rollout",
        "status",
        "deployment/module-math",
        "--timeout=60s",
    ]);
    bed.0.answers().await;
    let (_, listed) = bed.0.ask(bed.0.server.get("/modules")).await;
    let all = listed["modules"].as_array().unwrap();
    let math = all.iter().find(|one| one["module"] == "math").unwrap();
    assert_eq!(math.get("authority"), None, "{listed}");
    let (_, created) = bed.0.create("math", json!({})).await;
    let way = Way::of(&created);
    bed.kubectl(&[
        "rollout",
        "status",
        "deployment/module-math",
        "--timeout=60s",
    ]);
    let said = client.tells(&way, &["call", "sqrt", "16"]).await;
    assert_eq!(said, "4.0\n");
    bed.0.answers().await;
    let refused = client.says(&way.with_token(""), &["call", "sqrt", "16"]);
    assert!(refused.unwrap_err().contains("UNAUTHENTICATED"));
}

async fn removed_and_made_again_it_has_another_token(bed: &OnTheBed, client: &Client, old: &Way) {
    let removed = super::client().delete(bed.0.server.url("/pod/math"));
    assert_eq!(bed.0.ask(removed).await.0, 200);
    let of_math = ["get", MADE, "-l", "gantry.dev/module=math", "-o", "name"];
    assert_eq!(bed.kubectl(&of_math), "");
    let (_, created) = bed.0.create("math", json!({})).await;
    let new = Way::of(&created);
    assert_eq!(new.authority, old.authority);
    client.tells(&new, &["call", "sqrt", "16"]).await;
    let refused = client.says(old, &["call", "sqrt", "16"]);
    assert!(refused.unwrap_err().contains("UNAUTHENTICATED"));
    bed.0.answers().await;
}
