//! The way of a gRPC client outside the cluster: a host of the module's own at the ingress controller, and the
//! token that its server asks everybody for.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::manifest::{Making, labels, name_of};
use crate::model::{ModuleName, Scheme, SecretText, UserId};
use crate::platform::kubernetes::cluster::{Cluster, Failure, Kind, Manifest};
use crate::platform::kubernetes::namespace::MODULE_PORT;
use crate::platform::kubernetes::releases::random;

/// Random bytes of a token.
const TOKEN_BYTES: usize = 32;

/// The token's key in its Secret.
const TOKEN: &str = "token";

/// Seconds in which an ingress controller may hear nothing of a call: the longest call, and Gantry's own grace.
/// Controllers commonly give up after 60.
const SILENCE: &str = "75";

/// The largest message to a module: 8 MiB of arguments, and what goes with them. Controllers commonly take 1 MiB.
const BODY: &str = "9m";

/// The name of the Secret with the module's token.
fn token_name(module: &ModuleName) -> String {
    format!("{}-token", name_of(module))
}

/// The server's variable with the token. Without the Secret its pod does not start.
pub fn token_variable(module: &ModuleName) -> Value {
    let from = json!({ "secretKeyRef": { "name": token_name(module), "key": TOKEN } });
    json!({ "name": "MODULE_TOKEN", "valueFrom": from })
}

/// What tells ingress controllers that ask the Service that its port speaks HTTP/2 without TLS; the others go by the
/// port's `appProtocol`, or by the Ingress.
pub fn service_annotations() -> Value {
    json!({ "traefik.ingress.kubernetes.io/service.serversscheme": "h2c" })
}

impl Making {
    /// The module's host, for gRPC clients what they call the authority.
    pub fn authority(&self, user: &UserId, module: &ModuleName) -> String {
        format!("{}.{}", module.host_label(user), self.app_domain)
    }

    /// What leads the module's host to its Service.
    pub fn ingress(&self, user: &UserId, module: &ModuleName) -> Manifest {
        let service = json!({ "name": name_of(module), "port": { "number": MODULE_PORT } });
        let path = json!({ "path": "/", "pathType": "Prefix", "backend": { "service": service } });
        let mut body = json!({
            "metadata": {
                "name": name_of(module),
                "namespace": user.namespace(),
                "labels": labels(user, module),
                "annotations": {
                    "nginx.ingress.kubernetes.io/backend-protocol": "GRPC",
                    "nginx.ingress.kubernetes.io/proxy-body-size": BODY,
                    "nginx.ingress.kubernetes.io/proxy-read-timeout": SILENCE,
                    "nginx.ingress.kubernetes.io/proxy-send-timeout": SILENCE,
                },
            },
            "spec": {
                "ingressClassName": self.ingress_class,
                "rules": [{ "host": self.authority(user, module), "http": { "paths": [path] } }],
            },
        });
        if self.app_scheme == Scheme::Https {
            body["spec"]["tls"] = json!([{ "hosts": [self.authority(user, module)] }]);
        }
        Manifest::new(Kind::Ingress, body)
    }
}

fn token_secret(user: &UserId, module: &ModuleName, token: &SecretText) -> Manifest {
    let body = json!({
        "metadata": {
            "name": token_name(module),
            "namespace": user.namespace(),
            "labels": labels(user, module),
        },
        "type": "Opaque",
        "stringData": { TOKEN: token.expose() },
    });
    Manifest::new(Kind::Secret, body)
}

/// Makes the module's token, unless it is there: it stays the same until the module is removed. It is looked for
/// first, because a full quota, or a namespace that goes, refuses also what would change nothing.
pub async fn make_token(
    cluster: &Cluster,
    user: &UserId,
    module: &ModuleName,
) -> Result<(), Failure> {
    if token(cluster, user, module).await?.is_some() {
        return Ok(());
    }
    let token = SecretText::from(URL_SAFE_NO_PAD.encode(random::<TOKEN_BYTES>()?));
    match cluster.create(&token_secret(user, module, &token)).await {
        Err(failure) if !failure.is_conflict() => Err(failure),
        _ => Ok(()),
    }
}

/// The module's token; `None`: it has none, as those that an earlier version made.
pub async fn token(
    cluster: &Cluster,
    user: &UserId,
    module: &ModuleName,
) -> Result<Option<SecretText>, Failure> {
    let (namespace, name) = (user.namespace(), token_name(module));
    let secret = cluster.get(Kind::Secret, &namespace, &name).await?;
    let encoded = secret.as_ref().and_then(|s| s.data["data"][TOKEN].as_str());
    let text = encoded.and_then(|text| String::from_utf8(STANDARD.decode(text).ok()?).ok());
    Ok(text.map(SecretText::from))
}
