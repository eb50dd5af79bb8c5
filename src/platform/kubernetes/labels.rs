//! The names that Gantry's objects carry (design.md §5).

use serde_json::{Value, json};

use crate::model::{ReplId, UserId};

/// On everything Gantry made.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Its value, and the selector of all of it.
pub const GANTRY: &str = "gantry";
/// Everything Gantry made.
pub const MANAGED: &str = "app.kubernetes.io/managed-by=gantry";
/// Which installation made it: the namespace of its server.
pub const INSTALLATION: &str = "gantry.dev/installation";
/// Whose it is.
pub const USER: &str = "gantry.dev/user";
/// Which repl it belongs to.
pub const REPL: &str = "gantry.dev/repl";
/// Which module it belongs to.
pub const MODULE: &str = "gantry.dev/module";
/// Annotation of a module's Deployment: what it is to be, with all that a label cannot hold.
pub const MODULE_OF: &str = "gantry.dev/module-of";
/// Annotation of a module's Deployment: its host at the ingress controller.
pub const AUTHORITY: &str = "gantry.dev/authority";
/// Label of a module's pods that have packages of their own: which, as a checksum.
pub const PACKAGES: &str = "gantry.dev/packages";
/// On the volume with what pip has fetched.
pub const PACKAGE_CACHE: &str = "gantry.dev/package-cache";
/// Which service it belongs to.
pub const SERVICE: &str = "gantry.dev/service";
/// On everything of services, their namespace included: whose they are.
pub const SERVICES_OF: &str = "gantry.dev/services-of";
/// Everything Gantry made but services, which are watched by themselves.
pub const MANAGED_BUT_SERVICES: &str =
    "app.kubernetes.io/managed-by=gantry,!gantry.dev/services-of";
/// Services, and what checks their images.
pub const MANAGED_SERVICES: &str = "app.kubernetes.io/managed-by=gantry,gantry.dev/services-of";
/// A pod that shows whether an image can be had.
pub const IMAGE_CHECK: &str = "gantry.dev/image-check";
/// The Ingress in the server's own namespace that leads to the server while this repl is idle.
pub const IDLE: &str = "gantry.dev/idle";
/// What outlives a stop of its repl, and why: `database`.
pub const KEEP: &str = "gantry.dev/keep";
/// What a pod is: `test`; released pods have `app=prod`, databases `app=database`.
pub const ROLE: &str = "gantry.dev/role";
/// Released pods: `kubectl logs -l app=prod`.
pub const APP: &str = "app";
/// Value of [`APP`] on released pods.
pub const PROD: &str = "prod";
/// Value of [`APP`] on databases.
pub const DATABASE: &str = "database";
/// Value of [`ROLE`] on test pods.
pub const TEST: &str = "test";

/// Annotation: the submission whose tests passed.
pub const SUBMISSION: &str = "gantry.dev/submission";
/// Annotation: the release's number.
pub const RELEASE: &str = "gantry.dev/release";
/// Label of the Secrets with a repl's own variables, and annotation of what runs with them: which of all
/// that the repl had.
pub const REVISION: &str = "gantry.dev/revision";
/// Annotation: SHA-256 of the files that were tested.
pub const CODE_DIGEST: &str = "gantry.dev/code-digest";
/// Annotation: SHA-256 of the tests that passed.
pub const TESTS_DIGEST: &str = "gantry.dev/tests-digest";
/// Annotation: the image the tests ran in.
pub const IMAGE: &str = "gantry.dev/image";

/// Annotation of a test pod: when the server started that made it, in microseconds of the Unix clock.
pub const MADE_BY: &str = "gantry.dev/made-by";

/// Annotation of a test pod: the version of the runner's frames that its server speaks.
pub const FRAMES: &str = "gantry.dev/frames";

/// Annotation of a user's namespace, to the hour, and of a module's Deployment: when it was last used.
pub const USED: &str = "gantry.dev/last-used";

/// Labels of something of a user's.
pub fn of_user(user: &UserId) -> Value {
    json!({ MANAGED_BY: GANTRY, USER: user.as_str() })
}

/// Labels of something of a repl's.
pub fn of_repl(user: &UserId, repl: &ReplId) -> Value {
    json!({ MANAGED_BY: GANTRY, USER: user.as_str(), REPL: repl.as_str() })
}
