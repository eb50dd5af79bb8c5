//! Modules: a function of a Python module is called in a pod of its user's, and its result comes back.

mod busy;
mod channel;
mod large;
mod wire;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use hyper::http::uri::PathAndQuery;
use jiff::Timestamp;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use crate::budget::Budgets;
use crate::model::{
    ModuleName, ModuleSpec, ModuleState, ModuleStatus, Problem, Scale, SecretText, UserId,
};
use crate::platform::{Modules as Backend, ModulesError, PlatformError};
use busy::{Busy, Place};
use channel::Way;
pub use large::Held;
use large::{Account, Counted};
use wire::{
    CallOutcome, CallReply, CallRequest, DescribeRequest, Description, StreamEvent, StreamPart,
};
pub use wire::{Failure, Kind};

/// Largest message to or from a pod: a result, and what goes with it.
const MAX_MESSAGE: usize = (16 << 20) + (64 << 10);

/// Longest and usual time of a call, as of any run.
pub const MAX_CALL: Duration = Duration::from_secs(60);
const USUAL_CALL: Duration = Duration::from_secs(10);

/// The pod tells itself that a call took too long; only when it does not within this, Gantry does.
const GRACE: Duration = Duration::from_secs(5);

/// How long a new pod is waited for: as long as a release.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// A call waits for a pod that is being started again this long.
const BACK_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a module that is being made is waited for: less than an answer to a request may take. An installation may
/// take longer, and goes on.
const MADE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long all of it may take, with the module's first answer; a request has 90 s.
const CREATED_TIMEOUT: Duration = Duration::from_secs(75);

/// Modules of one user that are being made or changed at one time.
const MOST_MAKING: usize = 16;

/// Pause before a pod that does not answer yet is tried again.
const AGAIN: Duration = Duration::from_millis(25);

/// How long the names of a module's pods are taken as they were: a new one gets calls this much later.
const NAMES_KEPT: Duration = Duration::from_secs(1);

/// Between two looks for modules that nobody calls: a quarter of the time that they may be quiet, within these.
const LOOK_LEAST: Duration = Duration::from_secs(1);
const LOOK_MOST: Duration = Duration::from_secs(60);

/// Bytes of large answers that are held for one user at a time: two of the largest.
const ANSWERS_PER_USER: u32 = 36 << 20;

/// Bounds of all modules.
#[derive(Debug, Clone, Copy)]
pub struct ModuleOptions {
    /// Most calls of one user at a time.
    pub calls_per_user: usize,
    /// Most pods of all modules of one user.
    pub pods_per_user: u32,
    /// How long nobody may call a module before its pods are ended; `None`: any time.
    pub idle: Option<Duration>,
}

/// Why a module did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ModuleError {
    /// There is no pod of this module.
    #[error("there is no pod of this module")]
    NoPod,
    /// The module said no, or could not.
    #[error("{}", .0.message)]
    Failed(Box<Failure>),
    /// The pod was not made.
    #[error("{}", .0.message)]
    Refused(Problem),
    /// The pod, or the platform, does not answer.
    #[error("{}", .0.message)]
    Unavailable(Problem),
    /// No answer in time, not even that.
    #[error("no answer within {} ms", .0.as_millis())]
    Late(Duration),
    /// So many calls of the user's are under way already.
    #[error("{0} calls are under way already")]
    TooMany(usize),
}

impl From<Failure> for ModuleError {
    fn from(failure: Failure) -> Self {
        ModuleError::Failed(Box::new(failure))
    }
}

impl From<PlatformError> for ModuleError {
    fn from(error: PlatformError) -> Self {
        match error {
            PlatformError::NotFound(_) => ModuleError::NoPod,
            PlatformError::Unavailable(problem) | PlatformError::NotReady(problem) => {
                ModuleError::Unavailable(problem)
            }
        }
    }
}

/// The place of a call whose arguments are still to come.
#[derive(Debug)]
pub struct Begun {
    key: Key,
    place: Place,
}

/// A call of a function.
#[derive(Debug, Clone)]
pub struct Call {
    /// The function, dotted where it is inside something.
    pub method: String,
    /// A JSON list.
    pub args: Bytes,
    /// A JSON object.
    pub kwargs: Bytes,
    /// Longest time; `None`: the usual one.
    pub timeout: Option<Duration>,
}

/// What a function returned.
#[derive(Debug, Clone)]
pub struct Returned {
    /// As JSON.
    pub result: Bytes,
    /// The arguments did not fit, and the list itself was passed as the only one.
    pub as_list: bool,
    /// What the result takes of its user's budget: to be dropped when it has been sent.
    pub held: Held,
}

/// What happens while a function runs.
#[derive(Debug, Clone)]
pub enum Happening {
    /// A generator's next value, as JSON.
    Item(Bytes),
    /// What it printed.
    Output {
        /// `stdout` or `stderr`.
        stream: String,
        /// The bytes.
        data: Bytes,
    },
    /// The last one.
    End(Returned),
}

/// What can be called.
#[derive(Debug, Clone, Serialize)]
pub struct Described {
    /// The module.
    pub module: String,
    /// The version of its package, when it has one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Its docstring.
    pub doc: String,
    /// Its functions and classes.
    pub functions: Vec<FunctionDescribed>,
    /// Parts with functions of their own.
    pub namespaces: Vec<String>,
    /// There are more functions.
    pub truncated: bool,
}

/// A function of a module.
#[derive(Debug, Clone, Serialize)]
pub struct FunctionDescribed {
    /// Its name.
    pub name: String,
    /// Such as `(x, /)`; empty when Python does not know.
    pub signature: String,
    /// Its docstring.
    pub doc: String,
    /// It is a class.
    pub is_class: bool,
}

/// The pods of one module, and the ways to them.
#[derive(Debug)]
struct Kept {
    ways: Vec<(String, Way)>,
    looked: Instant,
    next: Arc<AtomicUsize>,
}

/// What is asked once more when a pod broke off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Again {
    /// Only what was not sent: a function may have run.
    Unsent,
    /// Anything: it changes nothing.
    Always,
}

type Key = (UserId, ModuleName);

/// Modules of a platform, and the ways to their pods.
#[derive(Debug, Clone)]
pub struct ModuleCalls {
    platform: Arc<dyn Backend>,
    kept: Arc<Mutex<HashMap<Key, Kept>>>,
    busy: Arc<Busy>,
    /// What large answers may take of the memory.
    budgets: Arc<Budgets<UserId>>,
    making: Arc<Mutex<HashMap<UserId, Made>>>,
    options: ModuleOptions,
}

/// What of a user's modules is being made: how many, with how many pods.
#[derive(Debug, Default, Clone, Copy)]
struct Made {
    modules: usize,
    pods: u32,
}

/// One module of a user's that is being made, until this is dropped.
struct Making {
    all: Arc<Mutex<HashMap<UserId, Made>>>,
    user: UserId,
    pods: u32,
}

impl Making {
    /// With so many pods more than the user has, of which there is room for `room`.
    fn begin(
        all: &Arc<Mutex<HashMap<UserId, Made>>>,
        user: &UserId,
        pods: u32,
        room: u32,
    ) -> Result<Self, ModuleError> {
        let mut now = all.lock().unwrap_or_else(PoisonError::into_inner);
        let made = now.get(user).copied().unwrap_or_default();
        if made.modules >= MOST_MAKING {
            return Err(ModuleError::TooMany(MOST_MAKING));
        }
        if pods > 0 && made.pods + pods > room {
            return Err(ModuleError::Refused(Problem::new(
                "quota_exceeded",
                "The user's modules would have too many pods",
                format!(
                    "{pods} more are asked for, and {} may be added",
                    room.saturating_sub(made.pods)
                ),
                "Remove a module that is not needed, or ask for fewer pods; the operator can raise GANTRY_MAX_MODULE_PODS.",
            )));
        }
        let made = now.entry(user.clone()).or_default();
        made.modules += 1;
        made.pods += pods;
        Ok(Self {
            all: Arc::clone(all),
            user: user.clone(),
            pods,
        })
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        let mut now = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = now.get_mut(&self.user) {
            made.modules -= 1;
            made.pods -= self.pods;
            if made.modules == 0 {
                now.remove(&self.user);
            }
        }
    }
}

impl ModuleCalls {
    /// Of this platform.
    pub fn new(platform: Arc<dyn Backend>, options: ModuleOptions) -> Self {
        Self {
            platform,
            kept: Arc::default(),
            busy: Busy::new(options.calls_per_user, options.idle.is_some()),
            budgets: Arc::new(Budgets::new(ANSWERS_PER_USER)),
            making: Arc::default(),
            options,
        }
    }

    /// Makes the module's pods, and returns when one answers: whether they were made now, and how it is. A
    /// module that does not exist, or cannot be imported, leaves no pods.
    pub async fn create(
        &self,
        user: &UserId,
        spec: &ModuleSpec,
    ) -> Result<(bool, ModuleStatus), ModuleError> {
        let until = Instant::now() + CREATED_TIMEOUT;
        let created = self.ensured(user, spec).await?;
        let key = (user.clone(), spec.name.clone());
        self.forget(&key);
        let until = until.min(Instant::now() + READY_TIMEOUT);
        match self.described(&key, "", until).await {
            Ok(_) => {}
            Err(ModuleError::Failed(failure)) => {
                if created {
                    self.platform.remove(user, &spec.name).await?;
                    self.forget(&key);
                }
                return Err(ModuleError::Failed(failure));
            }
            Err(error) => return Err(error),
        }
        let status = self.platform.status(user, &spec.name).await?;
        let mut status = status.ok_or(ModuleError::NoPod)?;
        // One has just answered; who looks at it now and then may not have seen that yet.
        status.state = ModuleState::Running;
        status.ready = status.ready.max(1);
        Ok((created, status))
    }

    /// Has the module be as it is wanted. It goes on when who asked is gone: an installation may take longer
    /// than an answer.
    async fn ensured(&self, user: &UserId, spec: &ModuleSpec) -> Result<bool, ModuleError> {
        let (more, room) = self.pods(user, spec).await?;
        let making = Making::begin(&self.making, user, more, room)?;
        let (platform, user, spec) = (Arc::clone(&self.platform), user.clone(), spec.clone());
        let name = spec.name.clone();
        let made = tokio::spawn(async move {
            let _making = making;
            platform.ensure(&user, &spec).await
        });
        let Ok(made) = timeout(MADE_TIMEOUT, made).await else {
            return Err(ModuleError::Unavailable(Problem::new(
                "module_starting",
                format!("The module {name} is not ready yet"),
                format!(
                    "making it takes longer than {} s, as its packages may; it goes on",
                    MADE_TIMEOUT.as_secs()
                ),
                "Ask again in a moment.",
            )));
        };
        match made {
            Ok(Ok(created)) => Ok(created),
            Ok(Err(ModulesError::Refused(problem))) => Err(ModuleError::Refused(problem)),
            Ok(Err(ModulesError::Platform(error))) => Err(error.into()),
            Err(error) => Err(ModuleError::Unavailable(Problem::new(
                "platform_unavailable",
                "The module's pods could not be made",
                error.to_string(),
                "This is a fault of the server's; look at its log.",
            ))),
        }
    }

    /// How many pods the module is to have more than now, and how many more the user may have.
    async fn pods(&self, user: &UserId, spec: &ModuleSpec) -> Result<(u32, u32), ModuleError> {
        let modules = self.platform.list().await?;
        let most =
            |module: &ModuleStatus| module.autoscale.map_or(module.replicas, |auto| auto.max);
        let own = modules.iter().filter(|module| module.user_id == *user);
        let have: u32 = own.clone().map(most).sum();
        let now = own
            .clone()
            .find(|module| module.module == spec.name)
            .map(most);
        let wanted = spec.scale.map_or(now.unwrap_or(1), Scale::most);
        let more = wanted.saturating_sub(now.unwrap_or(0));
        Ok((more, self.options.pods_per_user.saturating_sub(have)))
    }

    /// Starts the module again, if it was stopped because nobody called it.
    async fn awake(&self, key: &Key) -> Result<(), ModuleError> {
        if matches!(self.look(key).await, Ok(true)) {
            return Ok(());
        }
        let status = self.platform.status(&key.0, &key.1).await?;
        if status.is_none_or(|status| status.state != ModuleState::Stopped) {
            return Ok(());
        }
        tracing::info!(user = %key.0, module = %key.1, "a module that was stopped is called, and starts again");
        let spec = ModuleSpec {
            name: key.1.clone(),
            packages: None,
            scale: None,
        };
        self.ensured(&key.0, &spec).await?;
        self.forget(key);
        self.described(key, "", Instant::now() + READY_TIMEOUT)
            .await
            .map(drop)
    }

    /// Begins a call before its arguments are read, if the user may have one more and the module exists.
    pub async fn begin(&self, user: &UserId, name: &ModuleName) -> Result<Begun, ModuleError> {
        let key = (user.clone(), name.clone());
        let place = self.enter(&key).await?;
        match self.look(&key).await {
            Err(error @ ModuleError::NoPod) => Err(error),
            // Anything else may pass before the call is sent.
            _ => Ok(Begun { key, place }),
        }
    }

    /// Begins a call: its place, when there is one, in a module that is not stopped.
    async fn enter(&self, key: &Key) -> Result<Place, ModuleError> {
        let most = self.options.calls_per_user;
        let place = self.busy.enter(key).ok_or(ModuleError::TooMany(most))?;
        self.awake(key).await?;
        if self.options.idle.is_some() {
            self.platform.used(&key.0, &key.1);
        }
        Ok(place)
    }

    /// Ends the pods of modules that nobody has called for long, until stopped.
    pub async fn stop_idle(self, stop: CancellationToken) {
        let Some(idle) = self.options.idle else {
            return;
        };
        let began = Timestamp::now();
        let every = (idle / 4).clamp(LOOK_LEAST, LOOK_MOST);
        while stop.run_until_cancelled(sleep(every)).await.is_some() {
            if let Err(error) = self.stop_quiet(idle, began).await {
                tracing::warn!(%error, "modules that nobody calls were not stopped; the next round tries again");
            }
        }
    }

    async fn stop_quiet(&self, idle: Duration, began: Timestamp) -> Result<(), PlatformError> {
        let all = self.platform.list().await?;
        for status in &all {
            let key = (status.user_id.clone(), status.module.clone());
            let known = [Some(began), Some(status.since), status.last_used];
            let last = known.into_iter().flatten().max().unwrap_or(began);
            let since = Timestamp::now().duration_since(last);
            let since = Duration::try_from(since).unwrap_or(Duration::ZERO);
            let quiet = self
                .busy
                .quiet_for(&key)
                .map_or(since, |here| here.min(since));
            if quiet >= idle && status.state != ModuleState::Stopped {
                tracing::info!(user = %key.0, module = %key.1, "nobody has called the module for long; it is stopped");
                self.let_go(&key);
                self.platform.pause(&key.0, &key.1).await?;
            }
        }
        self.busy.retain(|key| {
            let mut all = all.iter();
            all.any(|status| status.user_id == key.0 && status.module == key.1)
        });
        Ok(())
    }

    /// Removes the module's pods; `false`: there were none.
    pub async fn remove(&self, user: &UserId, name: &ModuleName) -> Result<bool, ModuleError> {
        self.let_go(&(user.clone(), name.clone()));
        Ok(self.platform.remove(user, name).await?)
    }

    /// What calls of the module have to send that do not come by way of this server; `None`: there is no other
    /// way.
    pub async fn token(
        &self,
        user: &UserId,
        name: &ModuleName,
    ) -> Result<Option<SecretText>, ModuleError> {
        Ok(self.platform.token(user, name).await?)
    }

    /// Has it have so many pods.
    pub async fn scale(
        &self,
        user: &UserId,
        name: &ModuleName,
        scale: Scale,
    ) -> Result<ModuleStatus, ModuleError> {
        let known = self.platform.status(user, name).await?;
        known.ok_or(ModuleError::NoPod)?;
        let spec = ModuleSpec {
            name: name.clone(),
            packages: None,
            scale: Some(scale),
        };
        self.create(user, &spec).await.map(|(_, status)| status)
    }

    /// Every user's modules.
    pub async fn list(&self) -> Result<Vec<ModuleStatus>, ModuleError> {
        Ok(self.platform.list().await?)
    }

    /// What can be called in the module, or in a part of it.
    pub async fn describe(
        &self,
        user: &UserId,
        name: &ModuleName,
        namespace: &str,
    ) -> Result<Described, ModuleError> {
        let key = (user.clone(), name.clone());
        let _place = self.enter(&key).await?;
        let until = Instant::now() + BACK_TIMEOUT;
        let told = self.described(&key, namespace, until).await?;
        let functions = told.functions.into_iter().map(|one| FunctionDescribed {
            name: one.name,
            signature: one.signature,
            doc: one.doc,
            is_class: one.is_class,
        });
        Ok(Described {
            module: told.module,
            version: told.version,
            doc: told.doc,
            functions: functions.collect(),
            namespaces: told.namespaces,
            truncated: told.truncated,
        })
    }

    async fn described(
        &self,
        key: &Key,
        namespace: &str,
        until: Instant,
    ) -> Result<Description, ModuleError> {
        let request = DescribeRequest {
            namespace: namespace.to_owned(),
        };
        let bound = until.saturating_duration_since(Instant::now()) + GRACE;
        let asked = self.reached(key, until, Again::Always, |way| {
            let mut request = way.request(request.clone());
            request.set_timeout(bound);
            let account = self.account(key);
            async move {
                let mut client = client(way.channel, account);
                client.ready().await.map_err(not_ready)?;
                let codec = ProstCodec::<DescribeRequest, Description>::default();
                let answer = client.unary(request, path("Describe"), codec).await?;
                Ok(answer.into_inner())
            }
        });
        let described = timeout(bound, asked).await;
        let described = described.map_err(|_| ModuleError::Late(bound))??;
        match described.failure {
            Some(failure) => Err(failure.into()),
            None => Ok(described),
        }
    }

    /// Calls a function. When this is dropped, the call is ended.
    pub async fn call(&self, begun: Begun, call: &Call) -> Result<Returned, ModuleError> {
        let Begun { key, place: _place } = begun;
        let (request, bound) = prepared(call);
        let until = Instant::now() + BACK_TIMEOUT;
        let account = self.account(&key);
        let held = account.held.clone();
        let asked = self.reached(&key, until, Again::Unsent, |way| {
            let request = way.request(request.clone());
            let account = account.clone();
            async move {
                let mut client = client(way.channel, account);
                client.ready().await.map_err(not_ready)?;
                let codec = ProstCodec::<CallRequest, CallReply>::default();
                let answer = client.unary(request, path("Call"), codec).await?;
                Ok(answer.into_inner())
            }
        });
        let answered = timeout(bound, asked).await;
        returned(answered.map_err(|_| ModuleError::Late(bound))??, held)
    }

    /// Who pays for what a call answers.
    fn account(&self, key: &Key) -> Account {
        Account {
            budgets: Arc::clone(&self.budgets),
            user: key.0.clone(),
            held: Held::default(),
        }
    }

    /// Calls a function and tells what happens while it runs. When the stream is dropped, the call is
    /// ended.
    pub async fn stream(
        &self,
        begun: Begun,
        call: &Call,
    ) -> Result<impl Stream<Item = Result<Happening, ModuleError>> + Send + use<>, ModuleError>
    {
        let Begun { key, place } = begun;
        let (request, bound) = prepared(call);
        let until = Instant::now() + BACK_TIMEOUT;
        let asked = self.reached(&key, until, Again::Unsent, |way| {
            let mut request = way.request(request.clone());
            request.set_timeout(bound);
            let account = self.account(&key);
            async move {
                let mut client = client(way.channel, account);
                client.ready().await.map_err(not_ready)?;
                let codec = ProstCodec::<CallRequest, StreamEvent>::default();
                let answer = client
                    .server_streaming(request, path("Stream"), codec)
                    .await?;
                Ok(answer.into_inner())
            }
        });
        let answered = timeout(bound, asked).await;
        let events = answered.map_err(|_| ModuleError::Late(bound))??;
        Ok(events.filter_map(move |event| {
            // The call's place is held for as long as its events are.
            let _held = &place;
            std::future::ready(happening(event))
        }))
    }

    /// Asks one of the module's pods; one that cannot be reached yet is tried again until then.
    async fn reached<T, F: Future<Output = Result<T, Status>>>(
        &self,
        key: &Key,
        until: Instant,
        again: Again,
        ask: impl Fn(Way) -> F,
    ) -> Result<T, ModuleError> {
        loop {
            let error = match self.way(key).await {
                Ok(Some(way)) => match ask(way).await {
                    Ok(answer) => return Ok(answer),
                    Err(status) => match channel::not_connected(&status) {
                        Some(channel::NotConnected(error)) => error.into(),
                        None if again == Again::Always && is_cut(&status) => told(&status),
                        None => return Err(told(&status)),
                    },
                },
                Ok(None) => ModuleError::Unavailable(no_pod_yet()),
                Err(error) => error,
            };
            if matches!(error, ModuleError::NoPod) {
                return Err(error);
            }
            let failed = self.platform.status(&key.0, &key.1).await?;
            let failed = failed.filter(|status| status.state == ModuleState::Failed);
            if failed.is_some() || Instant::now() >= until {
                let cause = failed.and_then(|status| status.cause);
                return Err(with_cause(error, cause));
            }
            // Its name may be another one by now.
            self.forget(key);
            sleep(AGAIN).await;
        }
    }

    /// The way to the pod whose turn it is; `None`: there is none yet.
    async fn way(&self, key: &Key) -> Result<Option<Way>, ModuleError> {
        self.look(key).await?;
        Ok(self.locked().get(key).and_then(turn))
    }

    /// Has ways to the module's pods as they are now; `false`: there are none.
    async fn look(&self, key: &Key) -> Result<bool, ModuleError> {
        {
            let kept = self.locked();
            if let Some(kept) = kept.get(key)
                && kept.looked.elapsed() < NAMES_KEPT
            {
                return Ok(!kept.ways.is_empty());
            }
        }
        let (user, module) = key;
        let names = self.platform.replicas(user, module).await?;
        let names = names.ok_or(ModuleError::NoPod)?;
        let known = |kept: &Kept| {
            let mut names = names.iter();
            names.all(|name| kept.ways.iter().any(|(known, _)| known == name))
        };
        let all_known = self.locked().get(key).is_some_and(known);
        // A module that was removed and made again has another, and other pods.
        let authorization = match all_known {
            true => None,
            false => {
                let token = self.platform.token(user, module).await?;
                Some(token.as_ref().map(channel::authorization).transpose()?)
            }
        };
        let mut all = self.locked();
        let kept = all.entry(key.clone()).or_insert_with(|| Kept {
            ways: Vec::new(),
            looked: Instant::now(),
            next: Arc::default(),
        });
        kept.looked = Instant::now();
        kept.ways.retain(|(name, _)| names.contains(name));
        for name in names {
            let is_new = !kept.ways.iter().any(|(known, _)| *known == name);
            // Without having looked for its token, one that is new since then waits for the next look.
            if is_new && let Some(authorization) = authorization.clone() {
                let way = channel::open(&self.platform, (user, module), &name, authorization);
                kept.ways.push((name, way));
            }
        }
        Ok(!kept.ways.is_empty())
    }

    /// Has the names of the module's pods looked up again. Ways to those that stay are kept.
    fn forget(&self, key: &Key) {
        let mut all = self.locked();
        let Some(kept) = all.get_mut(key) else {
            return;
        };
        match kept.looked.checked_sub(NAMES_KEPT) {
            Some(before) => kept.looked = before,
            None => {
                all.remove(key);
            }
        }
    }

    /// Keeps no way to the module's pods, which are to end: they wait for connections that may bring a call. A call
    /// that is under way has its own hold on its way.
    fn let_go(&self, key: &Key) {
        self.locked().remove(key);
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn turn(kept: &Kept) -> Option<Way> {
    let next = kept.next.fetch_add(1, Ordering::Relaxed);
    let index = next.checked_rem(kept.ways.len())?;
    kept.ways.get(index).map(|(_, way)| way.clone())
}

fn client(channel: Channel, account: Account) -> Grpc<Counted<Channel>> {
    Grpc::new(Counted {
        inner: channel,
        account,
    })
    .max_decoding_message_size(MAX_MESSAGE)
    .max_encoding_message_size(MAX_MESSAGE)
}

fn path(method: &str) -> PathAndQuery {
    let path = match method {
        "Call" => "/gantry.module.v1.ModuleService/Call",
        "Stream" => "/gantry.module.v1.ModuleService/Stream",
        _ => "/gantry.module.v1.ModuleService/Describe",
    };
    PathAndQuery::from_static(path)
}

/// The request, and how long an answer is waited for.
fn prepared(call: &Call) -> (CallRequest, Duration) {
    let allowed = call.timeout.unwrap_or(USUAL_CALL).min(MAX_CALL);
    let request = CallRequest {
        method: call.method.clone(),
        args: call.args.clone(),
        kwargs: call.kwargs.clone(),
        timeout_ms: u32::try_from(allowed.as_millis()).unwrap_or(u32::MAX),
    };
    (request, allowed + GRACE)
}

fn returned(reply: CallReply, held: Held) -> Result<Returned, ModuleError> {
    match reply.outcome {
        Some(CallOutcome::Result(result)) => Ok(Returned {
            result,
            as_list: reply.called_with == "list",
            held,
        }),
        Some(CallOutcome::Failure(failure)) => Err(failure.into()),
        None => Err(ModuleError::Unavailable(strange(
            "a reply without an outcome",
        ))),
    }
}

fn happening(event: Result<StreamEvent, Status>) -> Option<Result<Happening, ModuleError>> {
    let event = match event {
        Ok(event) => event.event?,
        Err(status) => return Some(Err(told(&status))),
    };
    Some(match event {
        StreamPart::Item(item) => Ok(Happening::Item(item)),
        StreamPart::Output(output) => Ok(Happening::Output {
            stream: output.stream,
            data: output.data,
        }),
        StreamPart::End(reply) => returned(reply, Held::default()).map(Happening::End),
    })
}

fn not_ready(error: tonic::transport::Error) -> Status {
    Status::from_error(Box::new(error))
}

/// The connection broke, as far as a status can tell: one through a port-forward is there before anybody
/// listens at its other end, and ends while it is being taken up.
fn is_cut(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal
    )
}

/// What a gRPC status that no pod of ours makes on purpose means.
fn told(status: &Status) -> ModuleError {
    let said = match status.message() {
        "" => format!("{:?}", status.code()),
        message => message.to_owned(),
    };
    match status.code() {
        Code::DeadlineExceeded => ModuleError::Late(MAX_CALL),
        Code::OutOfRange | Code::ResourceExhausted
            if said.contains("larger than") || said.contains("too large") =>
        {
            let message = format!("the message is larger than {MAX_MESSAGE} bytes");
            Failure {
                kind: Kind::ResultTooLarge as i32,
                message,
                ..Failure::default()
            }
            .into()
        }
        Code::ResourceExhausted => Failure {
            kind: Kind::Busy as i32,
            message: said,
            ..Failure::default()
        }
        .into(),
        _ => ModuleError::Unavailable(Problem::new(
            "module_unavailable",
            "The module's pod broke off",
            said,
            "Ask again; whether the function ran is not known. GET /modules tells how the pod is.",
        )),
    }
}

fn strange(what: &str) -> Problem {
    Problem::new(
        "module_unavailable",
        "The module's pod answered what is no answer",
        what,
        "Remove its pod and create it again: it may run another version of the server.",
    )
}

fn no_pod_yet() -> Problem {
    Problem::new(
        "module_unavailable",
        "The module's pod does not run",
        "none of its pods is there",
        "Ask again in a moment; GET /modules tells how it is.",
    )
}

fn with_cause(error: ModuleError, cause: Option<String>) -> ModuleError {
    match (error, cause) {
        (ModuleError::Unavailable(problem), Some(cause)) => {
            ModuleError::Unavailable(Problem { cause, ..problem })
        }
        (error, _) => error,
    }
}
