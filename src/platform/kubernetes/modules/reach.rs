//! The way to a module's pod: straight to its address where that can be reached from here, else through the
//! API server by port-forward.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::platform::ByteStream;
use crate::platform::kubernetes::cluster::{Cluster, with_sources};
use crate::platform::kubernetes::namespace::MODULE_PORT;

/// Longest wait for a connection straight to a pod: in one network it is there in a millisecond.
const DIRECT: Duration = Duration::from_millis(500);

/// How long it is believed that pods' addresses cannot be reached from here: a route may come.
const BELIEVED: Duration = Duration::from_secs(60);

/// Longest wait for a port-forward: the API server asks the kubelet, as for an exec.
const FORWARD: Duration = Duration::from_secs(10);

/// Goes to pods.
#[derive(Debug, Clone)]
pub struct Reach {
    cluster: Cluster,
    /// Always by port-forward.
    forward_only: bool,
    /// When it last came out that pods' addresses cannot be reached.
    no_way: Arc<Mutex<Option<Instant>>>,
}

/// What came of going straight to a pod.
enum Direct {
    Connected(TcpStream),
    /// The pod said no: nobody listens yet.
    Refused(String),
    /// Its address cannot be reached from here.
    NoWay,
}

impl Reach {
    /// `forward_only`: never straight.
    pub fn new(cluster: &Cluster, forward_only: bool) -> Self {
        Self {
            cluster: cluster.clone(),
            forward_only,
            no_way: Arc::default(),
        }
    }

    /// A connection to the pod's gRPC port, or why there is none.
    pub async fn open(&self, pod: &Pod) -> Result<Box<dyn ByteStream>, String> {
        let believed = self.no_way().is_some_and(|at| at.elapsed() < BELIEVED);
        if self.forward_only || believed {
            return self.forward(pod).await;
        }
        match direct(pod).await {
            Direct::Connected(stream) => Ok(Box::new(stream)),
            Direct::Refused(why) => Err(why),
            Direct::NoWay => {
                let forwarded = self.forward(pod).await?;
                // The pod is well, so it is the way that is not there.
                *self.no_way() = Some(Instant::now());
                Ok(forwarded)
            }
        }
    }

    fn no_way(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.no_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn forward(&self, pod: &Pod) -> Result<Box<dyn ByteStream>, String> {
        let namespace = pod.namespace().unwrap_or_default();
        let api: Api<Pod> = Api::namespaced(self.cluster.client.clone(), &namespace);
        let name = pod.name_any();
        let opened = timeout(FORWARD, api.portforward(&name, &[MODULE_PORT])).await;
        let mut forwarder = match opened {
            Ok(Ok(forwarder)) => forwarder,
            Ok(Err(error)) => return Err(with_sources(&error)),
            Err(_) => return Err(format!("no port-forward within {} s", FORWARD.as_secs())),
        };
        let stream = forwarder.take_stream(MODULE_PORT);
        let stream = stream.ok_or_else(|| "the port-forward gave no stream".to_owned())?;
        Ok(Box::new(stream))
    }
}

/// Straight to the pod.
async fn direct(pod: &Pod) -> Direct {
    let status = pod.status.as_ref();
    let address = status.and_then(|status| status.pod_ip.as_ref()?.parse::<IpAddr>().ok());
    let Some(address) = address else {
        return Direct::Refused("its pod has no address yet".to_owned());
    };
    match timeout(DIRECT, TcpStream::connect((address, MODULE_PORT))).await {
        Ok(Ok(stream)) => match stream.set_nodelay(true) {
            Ok(()) => Direct::Connected(stream),
            Err(error) => Direct::Refused(error.to_string()),
        },
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => {
            Direct::Refused("its server does not listen yet".to_owned())
        }
        Ok(Err(_)) | Err(_) => Direct::NoWay,
    }
}
