//! One real server per test, on a free port, with its own data folder.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// No answer for this long is a failure: a busy machine with two cores is slow, not this slow.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Largest reply that is taken: a record of the journal bounds it.
const MAX_REPLY_BYTES: usize = 64 << 20;

pub struct Server {
    child: Child,
    variables: Vec<(String, String)>,
    through: Vec<String>,
    pub data: tempfile::TempDir,
    pub address: SocketAddr,
    pub admin: String,
    pub sign_in: String,
    /// The page that the sign-in link leads to.
    pub sign_in_url: String,
}

fn gantry(data: &Path) -> Command {
    gantry_through(data, &[])
}

/// Run by another program, which becomes it.
fn gantry_through(data: &Path, through: &[String]) -> Command {
    let program = env!("CARGO_BIN_EXE_gantry");
    let mut command = match through {
        [] => Command::new(program),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
    };
    for name in [
        "API_KEY",
        "HOST",
        "PORT",
        "DOMAIN",
        "APP_DOMAIN",
        "CORS_ORIGINS",
        "ELASTICSEARCH_HOST",
        "GANTRY_PLATFORM",
        "GANTRY_PEERS",
        "GANTRY_PEER_KEY",
        "GANTRY_REPLICA",
        "GANTRY_NAMESERVER",
    ] {
        command.env_remove(name);
    }
    command
        .env("GANTRY_DATA_DIR", data)
        .env("GANTRY_LOG", "warn");
    command
}

/// Starts it and reads what it prints until it says how to sign in.
fn start(
    data: &Path,
    port: u16,
    variables: &[(String, String)],
    through: &[String],
) -> (Child, SocketAddr, Option<String>, [String; 2]) {
    let mut child = gantry_through(data, through)
        .envs(variables.iter().cloned())
        .args(["serve", "--port", &port.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (mut address, mut admin, mut sign_in) = (None, None, None);
    for line in lines {
        let line = line.unwrap();
        if let Some(rest) = line.split_once(" is at http://") {
            address = rest.1.trim_end_matches('/').parse().ok();
        } else if let Some(rest) = line.trim().strip_prefix("admin key ") {
            admin = rest.split(' ').next().map(str::to_owned);
        } else if let Some((page, rest)) = line.split_once("#token=") {
            let page = page.rsplit(' ').next().unwrap_or_default().to_owned();
            let token = rest.split(' ').next().unwrap_or_default().to_owned();
            sign_in = Some([token, page]);
            break;
        }
    }
    (
        child,
        address.expect("no address"),
        admin,
        sign_in.expect("no sign-in link"),
    )
}

impl Server {
    pub fn start() -> Self {
        Self::start_as(0, &[])
    }

    /// On this port, with these variables.
    pub fn start_as(port: u16, variables: &[(&str, &str)]) -> Self {
        Self::start_by(port, variables, &[])
    }

    /// By another program, which becomes the server.
    #[allow(dead_code, reason = "one of the suites that share this starts one so")]
    pub fn start_through(through: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::start_by(0, variables, through)
    }

    fn start_by(port: u16, variables: &[(&str, &str)], through: &[&str]) -> Self {
        let through: Vec<String> = through.iter().map(|word| (*word).to_owned()).collect();
        let data = tempfile::tempdir().unwrap();
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let variables: Vec<_> = variables.iter().map(owned).collect();
        let (child, address, admin, sign_in) = start(data.path(), port, &variables, &through);
        let admin = admin.expect("the first start prints a key");
        let [sign_in, sign_in_url] = sign_in;
        Self {
            child,
            variables,
            through,
            data,
            address,
            admin,
            sign_in,
            sign_in_url,
        }
    }

    /// Ends it as a power cut would, and starts it again on the same port and data.
    pub fn restart(&mut self) {
        self.kill();
        self.start_again();
    }

    /// On the same port and data, after [`Server::kill`].
    pub fn start_again(&mut self) {
        let (child, address, admin, sign_in) = start(
            self.data.path(),
            self.address.port(),
            &self.variables,
            &self.through,
        );
        assert_eq!(address, self.address);
        assert!(admin.is_none(), "a key is made once");
        self.child = child;
        [self.sign_in, self.sign_in_url] = sign_in;
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn ask_to_end(&self) {
        let id = i32::try_from(self.child.id()).unwrap();
        let pid = rustix::process::Pid::from_raw(id).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    pub fn terminate(&mut self) -> std::process::ExitStatus {
        self.ask_to_end();
        self.child.wait().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn key_command(&self, args: &[&str]) -> Output {
        gantry(self.data.path())
            .arg("key")
            .args(args)
            .output()
            .unwrap()
    }

    pub fn user_key(&self, user: &str) -> (String, String) {
        let made = self.key_command(&["create", "--user", user, "-o", "json"]);
        assert!(made.status.success(), "{made:?}");
        let made: Value = serde_json::from_slice(&made.stdout).unwrap();
        let text = |name: &str| made[name].as_str().unwrap().to_owned();
        (text("id"), text("key"))
    }

    /// A key that another process made, which is known here at once.
    pub async fn user(&self, user: &str) -> (String, String) {
        let (id, key) = self.user_key(user);
        let asked = self.get("/session").header("x-api-key", &key).send().await;
        assert_eq!(asked.unwrap().status(), 200, "the new key does not work");
        (id, key)
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn get(&self, path: &str) -> reqwest::RequestBuilder {
        client().get(self.url(path))
    }

    pub fn post(&self, path: &str) -> reqwest::RequestBuilder {
        client().post(self.url(path))
    }

    pub fn delete(&self, path: &str) -> reqwest::RequestBuilder {
        client().delete(self.url(path))
    }

    pub async fn connect(&self, key: &str) -> Socket {
        Socket::open(self, "/ws/code", &[("x-api-key", key)])
            .await
            .unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // Asked, not killed: sandboxes outlive a server that is killed.
        self.ask_to_end();
        let asked = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if asked.elapsed() > PATIENCE {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .timeout(PATIENCE)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .unwrap()
}

pub struct Socket(pub WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    /// Opens one, or the HTTP status that refused it.
    pub async fn open(server: &Server, path: &str, headers: &[(&str, &str)]) -> Result<Self, u16> {
        let url = format!("ws://{}{path}", server.address);
        let mut request = url.into_client_request().unwrap();
        for (name, value) in headers {
            let name: axum::http::HeaderName = name.parse().unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_REPLY_BYTES))
            .max_frame_size(Some(MAX_REPLY_BYTES));
        match tokio_tungstenite::connect_async_with_config(request, Some(config), false).await {
            Ok((socket, _)) => Ok(Self(socket)),
            Err(Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("{error}"),
        }
    }

    pub async fn send(&mut self, text: impl Into<String>) {
        self.0.send(Message::text(text.into())).await.unwrap();
    }

    /// The next frame as JSON.
    pub async fn next(&mut self) -> Value {
        loop {
            match tokio::time::timeout(PATIENCE, self.0.next())
                .await
                .expect("no frame")
            {
                Some(Ok(Message::Text(text))) => return serde_json::from_str(&text).unwrap(),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => panic!("no frame but {other:?}"),
            }
        }
    }

    pub async fn ask(&mut self, text: impl Into<String>) -> Value {
        self.send(text).await;
        self.next().await
    }

    /// How the server closed it.
    pub async fn closed(&mut self, within: Duration) -> Option<CloseFrame> {
        let closing = async {
            loop {
                match self.0.next().await {
                    Some(Ok(Message::Close(frame))) => return frame,
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return None,
                }
            }
        };
        tokio::time::timeout(within, closing)
            .await
            .expect("it was not closed")
    }
}

pub fn hello(user: &str) -> String {
    format!(r#"{{"user_id":"{user}","code":"print('Hello')","deploy":false}}"#)
}
