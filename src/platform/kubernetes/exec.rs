//! One kube exec as a stream of bytes: the bridge to a test pod's runner.
//!
//! What kube's `AttachedProcess` leaves to its users is done here. One slow reader would hold up the
//! other streams and the pings, so each stream has a task and room of its own. A connection that is
//! closed without a status looks like success, so the end of the stream is always an error here: only
//! the runner's own frames are results. Buffers are 1 KiB unless asked for.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{AttachParams, AttachedProcess};
use kube::client::UpgradeConnectionError;
use kube::{Api, Client};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::cache::Now;
use super::test_pod::{CONTAINER, Life, life};

/// Room between kube's loop and each of our tasks: several of its 32 KiB messages.
const BUFFER: usize = 256 << 10;

/// Bytes kept of what the bridge says on stderr, to explain its end.
const KEPT_STDERR: usize = 4 << 10;

/// Longest wait for the exec to be taken on: the API server asks the kubelet, the kubelet starts a
/// process. 0.1 s on an idle machine.
const UPGRADE: Duration = Duration::from_secs(10);

/// How long after the stream's end its status and last words may take.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The stream. Dropping it ends the bridge and nothing else.
pub struct ExecStream {
    // Bounded by the output limits of the runs under way: the runner never sends more unasked.
    received: mpsc::UnboundedReceiver<io::Result<Bytes>>,
    rest: Bytes,
    stdin: Pin<Box<dyn AsyncWrite + Send>>,
    tasks: Vec<JoinHandle<()>>,
}

/// Why there is no stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecError {
    /// The API server refuses; trying again does not help.
    Refused(String),
    /// The API server does not answer.
    Away(String),
    /// The pod or its container is gone.
    Gone(String),
    /// Something else that may pass.
    Failed(String),
    /// The runner took the connection and did not say a word.
    Hung,
}

impl ExecStream {
    /// Starts the bridge in this life of the pod and waits for the runner's first byte: it greets
    /// first, so a stream without one leads to nobody.
    pub async fn open(
        client: &Client,
        namespace: &str,
        pod: &str,
        of: &Life,
        mut now: Now<Pod>,
        greeting: Duration,
    ) -> Result<Self, ExecError> {
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let params = AttachParams {
            container: Some(CONTAINER.to_owned()),
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
            max_stdin_buf_size: Some(BUFFER),
            max_stdout_buf_size: Some(BUFFER),
            max_stderr_buf_size: Some(BUFFER),
        };
        let opening = api.exec(pod, ["gantry-runner", "attach"], &params);
        let process = match timeout(UPGRADE, opening).await {
            Ok(Ok(process)) => process,
            Ok(Err(error)) => return Err(refusal(&error)),
            Err(_) => {
                let seconds = UPGRADE.as_secs();
                return Err(ExecError::Away(format!(
                    "the API server did not take on the exec within {seconds} s"
                )));
            }
        };
        let mut stream = Self::over(process)?;
        match timeout(greeting, stream.received.recv()).await {
            Ok(Some(Ok(first))) => stream.rest = first,
            Ok(Some(Err(error))) => return Err(ExecError::Failed(error.to_string())),
            Ok(None) => return Err(ExecError::Failed("the bridge ended".to_owned())),
            Err(_) => return Err(ExecError::Hung),
        }
        // Beside the stream the pod itself is watched: a node that is lost closes no connection.
        let (tell, mut relayed) = mpsc::unbounded_channel();
        std::mem::swap(&mut stream.received, &mut relayed);
        let of = of.clone();
        stream.tasks.push(tokio::spawn(async move {
            let lives = |pod: &Option<Arc<Pod>>| pod.as_deref().and_then(life).as_ref() == Some(&of);
            loop {
                let item = tokio::select! {
                    item = relayed.recv() => item,
                    _ = now.wait_for(|pod| !lives(pod)) => {
                        Some(Err(io::Error::other("the test pod was deleted, or its container ended")))
                    }
                };
                let Some(item) = item else { return };
                let over = item.is_err();
                if tell.send(item).is_err() || over {
                    return;
                }
            }
        }));
        Ok(stream)
    }

    fn over(mut process: AttachedProcess) -> Result<Self, ExecError> {
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (process.stdin(), process.stdout(), process.stderr())
        else {
            return Err(ExecError::Failed("the exec has no streams".to_owned()));
        };
        let words = Arc::new(Mutex::new(VecDeque::new()));
        let listening = tokio::spawn(listen(stderr, Arc::clone(&words)));
        let (tell, received) = mpsc::unbounded_channel();
        let passing = tokio::spawn(pass_on(stdout, process, words, tell));
        Ok(Self {
            received,
            rest: Bytes::new(),
            stdin: Box::pin(stdin),
            tasks: vec![listening, passing],
        })
    }
}

impl Drop for ExecStream {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Passes on what the runner says; at the end, why it is the end.
async fn pass_on(
    mut stdout: impl AsyncRead + Unpin,
    mut process: AttachedProcess,
    words: Arc<Mutex<VecDeque<u8>>>,
    tell: mpsc::UnboundedSender<io::Result<Bytes>>,
) {
    let status = process.take_status();
    let mut buffer = BytesMut::with_capacity(BUFFER);
    let broken = loop {
        buffer.reserve(BUFFER);
        match stdout.read_buf(&mut buffer).await {
            Ok(0) => break None,
            Ok(_) => {
                if tell.send(Ok(buffer.split().freeze())).is_err() {
                    return;
                }
            }
            Err(error) => break Some(error.to_string()),
        }
    };
    let status = match status {
        Some(status) => timeout(LAST_WORDS, status).await.ok().flatten(),
        None => None,
    };
    let ended = match status {
        Some(status) => status
            .message
            .unwrap_or_else(|| "the bridge ended".to_owned()),
        None => broken.unwrap_or_else(|| "the connection was closed without a status".to_owned()),
    };
    let words: Vec<u8> = {
        let words = words.lock().unwrap_or_else(PoisonError::into_inner);
        words.iter().copied().collect()
    };
    let words = String::from_utf8_lossy(&words);
    let why = match words.trim() {
        "" => ended,
        words => format!("{ended}; it said: {words}"),
    };
    let _ = tell.send(Err(io::Error::new(io::ErrorKind::ConnectionAborted, why)));
}

/// Keeps the bridge's last words.
async fn listen(mut stderr: impl AsyncRead + Unpin, words: Arc<Mutex<VecDeque<u8>>>) {
    let mut buffer = vec![0; 4 << 10];
    while let Ok(length) = stderr.read(&mut buffer).await {
        if length == 0 {
            return;
        }
        let mut words = words.lock().unwrap_or_else(PoisonError::into_inner);
        words.extend(&buffer[..length]);
        let excess = words.len().saturating_sub(KEPT_STDERR);
        words.drain(..excess);
    }
}

/// What a refused upgrade means; its own text is only a number.
fn refusal(error: &kube::Error) -> ExecError {
    let code = match error {
        kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(code)) => {
            code.as_u16()
        }
        kube::Error::Api(status) => status.code,
        other => return ExecError::Away(super::cluster::with_sources(other)),
    };
    match code {
        400 => ExecError::Gone(
            "the API server answered 400 to the exec: the pod's container is not running".to_owned(),
        ),
        404 => ExecError::Gone("the API server answered 404 to the exec: the pod is gone".to_owned()),
        401 => ExecError::Refused(
            "the API server answered 401 to the exec: Gantry's credentials are not valid any more".to_owned(),
        ),
        403 => ExecError::Refused(
            "the API server answered 403 to the exec: Gantry's role needs both get and create on pods/exec \
             (a WebSocket upgrade is a GET, and since Kubernetes 1.35 create is asked for as well)"
                .to_owned(),
        ),
        code => ExecError::Failed(format!("the API server answered {code} to the exec")),
    }
}

impl AsyncRead for ExecStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match std::task::ready!(self.received.poll_recv(context)) {
                Some(Ok(bytes)) => self.rest = bytes,
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => {
                    let ended =
                        io::Error::new(io::ErrorKind::ConnectionAborted, "the bridge ended");
                    return Poll::Ready(Err(ended));
                }
            }
        }
        let length = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest[..length]);
        self.rest.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ExecStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stdin.as_mut().poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stdin.as_mut().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stdin.as_mut().poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::StatusCode;

    #[test]
    fn a_refused_upgrade_names_its_cause() {
        let refused = |code: StatusCode| {
            refusal(&kube::Error::UpgradeConnection(
                UpgradeConnectionError::ProtocolSwitch(code),
            ))
        };
        assert!(
            matches!(refused(StatusCode::FORBIDDEN), ExecError::Refused(why) if why.contains("get and create on pods/exec"))
        );
        assert!(matches!(refused(StatusCode::NOT_FOUND), ExecError::Gone(_)));
        assert!(matches!(
            refused(StatusCode::BAD_REQUEST),
            ExecError::Gone(_)
        ));
        assert!(matches!(
            refused(StatusCode::BAD_GATEWAY),
            ExecError::Failed(_)
        ));
    }
}
