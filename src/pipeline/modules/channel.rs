//! One kept gRPC channel for each pod of a module, made over whatever connection the platform gives, and what calls
//! over it have to send.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::Service;

use crate::model::{ModuleName, Problem, SecretText, UserId};
use crate::platform::{ByteStream, Modules, PlatformError};

/// Longest wait for a connection: a pod is in the same network, and a port-forward asks the API server
/// first.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A pod that is silent is asked whether it lives; a call may be silent for as long as it may run.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_PATIENCE: Duration = Duration::from_secs(15);

/// What may be under way at a time without waiting for the other side. A user may have as many connections
/// as pods.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 2 << 20;

/// Why there is no connection. Nothing was sent.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct NotConnected(pub PlatformError);

/// Connects to one pod.
#[derive(Debug, Clone)]
struct Connector {
    platform: Arc<dyn Modules>,
    user: UserId,
    module: ModuleName,
    replica: Arc<str>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Box<dyn ByteStream>>;
    type Error = NotConnected;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let stream = this
                .platform
                .dial(&this.user, &this.module, &this.replica)
                .await
                .map_err(NotConnected)?;
            Ok(TokioIo::new(stream))
        })
    }
}

/// A token as calls send it.
pub type Authorization = MetadataValue<Ascii>;

/// The token as calls send it.
pub fn authorization(token: &SecretText) -> Result<Authorization, PlatformError> {
    let text = format!("Bearer {}", token.expose());
    let mut value: Authorization = text.parse().map_err(|_| {
        PlatformError::Unavailable(Problem::new(
            "module_unavailable",
            "The module's token cannot be sent",
            "it holds what is no printable ASCII",
            "Remove the module and create it again: it gets another token.",
        ))
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// The way to one pod.
#[derive(Debug, Clone)]
pub struct Way {
    /// To its server.
    pub channel: Channel,
    authorization: Option<Authorization>,
}

impl Way {
    /// The message as the pod takes it.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(value) = &self.authorization {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", value.clone());
        }
        request
    }
}

/// The way to the pod; it connects when it is first used, and again after it was cut.
pub fn open(
    platform: &Arc<dyn Modules>,
    (user, module): (&UserId, &ModuleName),
    replica: &str,
    authorization: Option<Authorization>,
) -> Way {
    let connector = Connector {
        platform: Arc::clone(platform),
        user: user.clone(),
        module: module.clone(),
        replica: replica.into(),
    };
    // The name is the pod's business only: the connection is there already.
    let channel = Endpoint::from_static("http://module")
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_PATIENCE)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_with_connector_lazy(connector);
    Way {
        channel,
        authorization,
    }
}

/// Why there was no connection, if that is what went wrong.
pub fn not_connected(status: &tonic::Status) -> Option<NotConnected> {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if let Some(found) = error.downcast_ref::<NotConnected>() {
            return Some(found.clone());
        }
        source = error.source();
    }
    None
}
