//! What runs inside pods, and what the server does for it.

use std::collections::BTreeMap;

use gantry::platform::{Platform, PlatformError};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;
use serde_json::Value;

use crate::bed::{Bed, SERVER, eventually};

/// What a program finds out about its own container, as JSON.
const LOOK: &str = "
import glob, json, os
def can_write(path):
    try:
        open(path, 'w').close()
        return True
    except OSError:
        return False
status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
VERSION = json.dumps({
    'uid': os.getuid(),
    'capabilities': [status[name].strip() for name in ('CapEff', 'CapPrm', 'CapInh', 'CapBnd', 'CapAmb')],
    'no_new_privileges': status['NoNewPrivs'].strip(),
    'seccomp': status['Seccomp'].strip(),
    'token': glob.glob('/var/run/secrets/kubernetes.io/*') + glob.glob('/run/secrets/kubernetes.io/*'),
    'links': sorted(name for name in os.environ if name.endswith('_SERVICE_HOST') and not name.startswith('KUBERNETES_')),
    'store': sorted(name for name in os.environ if name.startswith(('AWS_', 'S3_'))),
    'root': [path for path in ('/x', '/etc/x', '/usr/local/bin/x', '/var/x') if can_write(path)],
    'workspace': can_write('/workspace/x'),
})
";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_program_has_no_token_no_privilege_and_no_key_of_the_store() {
    let bed = Bed::start().await;
    let user = bed.user("bare");
    let repl = bed.repl(&user);
    let code = format!("{LOOK}{SERVER}");
    let mut spec = bed.spec(&user, &repl, &code, BTreeMap::new()).await;
    spec.database = true;
    bed.platform.ensure_release(&spec).await.unwrap();
    let page = bed.page(&repl).await;
    let text = page.rsplit("\r\n\r\n").next().unwrap();
    let found: Value = serde_json::from_str(text).unwrap();
    assert_eq!(found["uid"], 1000, "{found}");
    for capabilities in found["capabilities"].as_array().unwrap() {
        assert_eq!(capabilities, "0000000000000000", "{found}");
    }
    assert_eq!(
        (&found["no_new_privileges"], &found["seccomp"]),
        (&"1".into(), &"2".into())
    );
    for nothing in ["token", "links", "store", "root"] {
        assert_eq!(
            found[nothing],
            Value::Array(Vec::new()),
            "{nothing}: {found}"
        );
    }
    // The control: what it may do.
    assert_eq!(found["workspace"], true);

    let pods: Api<Pod> = Api::namespaced(bed.client.clone(), &user.namespace());
    let pods = pods.list(&ListParams::default()).await.unwrap().items;
    assert_eq!(pods.len(), 2, "a program and its database");
    for pod in pods {
        let spec = pod.spec.unwrap();
        assert_eq!(spec.automount_service_account_token, Some(false));
        assert_eq!(spec.enable_service_links, Some(false));
        let projected = spec.volumes.iter().flatten();
        assert!(
            projected
                .filter_map(|v| v.projected.as_ref())
                .next()
                .is_none()
        );
        let security = spec.security_context.unwrap();
        assert_eq!(security.run_as_non_root, Some(true));
        assert_eq!(security.seccomp_profile.unwrap().type_, "RuntimeDefault");
        let init = spec.init_containers.into_iter().flatten();
        for container in init.chain(spec.containers) {
            let security = container.security_context.unwrap();
            assert_eq!(security.allow_privilege_escalation, Some(false));
            assert_eq!(security.read_only_root_filesystem, Some(true));
            assert_eq!(security.capabilities.unwrap().drop.unwrap(), ["ALL"]);
        }
    }
    bed.platform.shutdown().await;
    bed.forget(user.as_str()).await;
}

/// What a database has is bounded by its volume, and its user can delete it when the repl is stopped.
#[tokio::test]
#[ignore = "needs the bed"]
async fn data_are_bounded_and_can_be_deleted() {
    let bed = Bed::start().await;
    let user = bed.user("data");
    let repl = bed.repl(&user);
    let code = format!("VERSION = 'one'\n{SERVER}");
    let mut spec = bed.spec(&user, &repl, &code, BTreeMap::new()).await;
    spec.database = true;
    bed.platform.ensure_release(&spec).await.unwrap();
    let data = bed.platform.data(&repl).await.unwrap();
    assert_eq!((data.bytes, data.limit_bytes), (None, Some(1 << 30)));
    let running = bed.platform.delete_data(&repl).await;
    assert!(matches!(running, Err(PlatformError::NotReady(why)) if why.code == "repl_runs"));
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.platform.delete_data(&repl).await.unwrap();
    eventually("the volume goes", || async {
        bed.platform.data(&repl).await.unwrap().bytes == Some(0)
    })
    .await;
    bed.forget(user.as_str()).await;
}
