//! The vocabulary: what Gantry's words mean, as types that cannot be wrong.
//!
//! Nothing here does I/O and nothing here knows Kubernetes or HTTP. Everything else may import it.

mod data;
mod domain;
pub mod entry;
mod event;
mod id;
mod image;
mod language;
mod letters;
mod limits;
mod module;
mod network;
mod order;
mod outcome;
mod packages;
mod problem;
mod release;
mod service;
mod settings;
mod site;
mod submission;
mod tested;
mod ticket;
mod workspace;

pub use data::{DiskBounds, ReplData, repl_runs};
pub use domain::{Domain, DomainProof, DomainsRequest, MAX_DOMAINS, domain_taken, is_host_label};
pub use event::{Ending, Event, Origin, OutputStream, Record, RunReport, Step, StepState};
pub use id::{IdError, ReplId, ServiceName, SubmissionId, UserId};
pub use image::{ImageError, ImageName};
pub use language::{
    BUILD_ARCHIVE, BUILD_FOLDER, Compile, LANGUAGES, Language, Proof, TestCommand, TestFiles,
    TestRunner, Tool, Words,
};
pub use letters::{begin_with_a_letter, whole_letters};
pub use limits::{Limits, LimitsRequest, MAX_CODE_BYTES, MAX_MESSAGE_BYTES};
pub use module::{
    MAX_MODULE_REPLICAS, ModuleName, ModuleNameError, ModuleRequest, ModuleSpec, ModuleState,
    ModuleStatus, Package, scale as module_scale,
};
pub use network::{Network, NetworkError};
pub use order::{LatestOrder, MAX_KNOWN_DELETED, Order, SUPERSEDED, is_known_after, superseded};
pub use outcome::{Outcome, Reason, Status, TestCounts, TestOutcome, TestResult, Usage};
pub use packages::{
    INDEX_FAILED, INDEX_SAID, Install, NO_INSTALLER, Naming, PACKAGE_PROXY, PROXY_VARIABLES,
    PackageIndex, Packages, Place, Registry, index_failed, package_place, patient,
};
pub use problem::Problem;
pub use release::{
    MAX_RELEASES, Release, ReleaseState, ReplState, ReplStatus, Serves, forgotten_first, idle_cause,
};
pub use service::{
    ContainerSpec, ContainerState, ContainerStatus, Happening, MAX_REPLICAS, NodeState, NodeStatus,
    ServiceEvent, ServiceOutcome, ServiceSpec, ServiceState, ServiceStatus, ServicesRequest,
    Snapshot,
};
pub use settings::{
    Autoscale, MAX_REPL_REPLICAS, ReplChange, ReplSettings, Scale, ScaleRequest, SecretText,
    Variables, VariablesChange, workspace_not_scaled,
};
pub use site::{Scheme, Site, Sites};
pub use submission::{
    Case, Compare, FieldError, RelativePath, Submission, SubmissionRequest, Tests, Tolerance, cut,
};
pub use tested::Tested;
pub use ticket::TicketKey;
pub use workspace::{
    Extras, MAX_EXTRAS_BYTES, MAX_WORKSPACE_BYTES, MAX_WORKSPACE_DEPTH, MAX_WORKSPACE_ENTRIES,
    MAX_WORKSPACE_FILE_BYTES, Unsaved, WORKSPACE_EXTRAS, is_gantrys, stays_inside,
};
