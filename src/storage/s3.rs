//! The code store in an S3 bucket, on AWS or on any server that speaks its protocol.
//!
//! | key | what |
//! |---|---|
//! | `releases/{repl}/{submission}/…` | a release's files; never changed once its manifest is there |
//! | `releases/{repl}/{submission}.manifest.json` | what belongs to it, written last: a release without it is none |
//! | `code/{repl}/…` | the repl's current files |
//!
//! The manifest stands beside the files and not among them, so that whatever copies the prefix, such
//! as `aws s3 cp --recursive`, copies the release and nothing else.

mod grant;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use aws_credential_types::Credentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;

use super::{CodeStore, FILE_REFUSED, LANES, lane};
use crate::model::{BUILD_ARCHIVE, Problem, RelativePath, ReplId, SubmissionId};
pub use grant::{
    FETCH_GREETING, FETCH_PORT, FETCH_TAKEN, GrantedFile, INCOMPLETE, MAX_OFFER_BYTES, Offer,
    REFUSED,
};

/// Longest wait for a connection: what the SDKs of AWS wait.
const CONNECT_PATIENCE: Duration = Duration::from_millis(3_100);

/// Longest wait for one try of one request. Most objects are small: 8 MiB at the most when they were submitted.
const ATTEMPT_PATIENCE: Duration = Duration::from_secs(10);

/// Longer objects get more: a second for each MiB.
const SMALL_BYTES: usize = 8 << 20;

/// Longest key, as S3 has it.
const MAX_KEY_BYTES: usize = 1_024;

/// Longest wait for one request with all its tries. A store that is away longer than this is told to
/// the user; the verdict on the code stands all the same.
const REQUEST_PATIENCE: Duration = Duration::from_secs(30);

/// Tries of one request. The pauses between them double, from one second with chance in it.
const ATTEMPTS: u32 = 4;

/// Requests at one time for one release.
const PARALLEL: usize = 16;

/// The region that is named when none is: compatible servers rarely have one, and signatures need it.
const DEFAULT_REGION: &str = "us-east-1";

/// Where the bucket is and how to get in.
#[derive(Debug, Clone)]
pub struct S3Config {
    /// The bucket.
    pub bucket: String,
    /// Its region.
    pub region: String,
    /// Who asks.
    pub access_key_id: String,
    /// The proof.
    pub secret_access_key: SecretString,
    /// With temporary keys.
    pub session_token: Option<SecretString>,
    /// A server that is not AWS.
    pub endpoint: Option<String>,
}

impl S3Config {
    /// The configuration in these variables, named as the SDKs of AWS name them. `None` when there
    /// is no `S3_BUCKET`.
    pub fn from_variables(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<S3Config>, Problem> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let Some(bucket) = set("S3_BUCKET") else {
            return Ok(None);
        };
        let needed = |name: &str| {
            set(name).ok_or_else(|| {
                Problem::new(
                    "store_config",
                    "The code store is not configured",
                    format!("S3_BUCKET is {bucket} and {name} is not set"),
                    format!("Set {name}."),
                )
            })
        };
        let region = set("AWS_REGION").or_else(|| set("AWS_DEFAULT_REGION"));
        let endpoint = set("AWS_ENDPOINT_URL_S3").or_else(|| set("AWS_ENDPOINT_URL"));
        Ok(Some(S3Config {
            region: region.unwrap_or_else(|| DEFAULT_REGION.to_owned()),
            access_key_id: needed("AWS_ACCESS_KEY_ID")?,
            secret_access_key: needed("AWS_SECRET_ACCESS_KEY")?.into(),
            session_token: set("AWS_SESSION_TOKEN").map(SecretString::from),
            endpoint,
            bucket,
        }))
    }
}

/// One object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its whole key.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// When it was written.
    pub modified: Timestamp,
}

/// What belongs to a release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its files, by path below the release's prefix.
    pub files: BTreeMap<String, ManifestFile>,
}

/// One file of a release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

impl ManifestFile {
    fn of(content: &[u8]) -> Self {
        Self {
            bytes: content.len() as u64,
            sha256: hexadecimal(&Sha256::digest(content)),
        }
    }
}

impl Manifest {
    /// The key of the manifest of the release under this prefix.
    pub fn key(prefix: &str) -> String {
        format!("{}.manifest.json", prefix.trim_end_matches('/'))
    }

    fn of(files: &BTreeMap<RelativePath, String>) -> Self {
        let entry = |(path, text): (&RelativePath, &String)| {
            (path.as_str().to_owned(), ManifestFile::of(text.as_bytes()))
        };
        Self {
            files: files.iter().map(entry).collect(),
        }
    }
}

/// A digest as text.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The prefix of one release.
pub fn release_prefix(repl: &ReplId, submission: SubmissionId) -> String {
    format!("releases/{repl}/{submission}/")
}

/// The code store in a bucket.
pub struct S3Store {
    client: Client,
    bucket: String,
    endpoint: String,
    lanes: [Mutex<()>; LANES],
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store")
            .field("bucket", &self.bucket)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl S3Store {
    /// A store in this bucket. Nothing is asked of it yet; see [`S3Store::check`].
    pub fn open(config: S3Config) -> S3Store {
        let credentials = Credentials::new(
            config.access_key_id,
            config.secret_access_key.expose_secret(),
            config
                .session_token
                .map(|token| token.expose_secret().to_owned()),
            None,
            "environment",
        );
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(Provider::Rustls(CryptoMode::Ring))
            .build_https();
        let time_outs = TimeoutConfig::builder()
            .connect_timeout(CONNECT_PATIENCE)
            .operation_attempt_timeout(ATTEMPT_PATIENCE)
            .operation_timeout(REQUEST_PATIENCE)
            .build();
        let mut settings = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(config.region.clone()))
            .credentials_provider(credentials)
            .http_client(http)
            .timeout_config(time_outs)
            .retry_config(RetryConfig::standard().with_max_attempts(ATTEMPTS))
            // Compatible servers know neither bucket names as host names nor every new checksum.
            .force_path_style(true)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        let endpoint = match config.endpoint {
            Some(endpoint) => {
                settings = settings.endpoint_url(&endpoint);
                endpoint
            }
            None => format!("AWS in {}", config.region),
        };
        S3Store {
            client: Client::from_conf(settings.build()),
            bucket: config.bucket,
            endpoint,
            lanes: std::array::from_fn(|_| Mutex::new(())),
        }
    }

    /// Whether the bucket is there and lets us in.
    pub async fn check(&self) -> Result<(), Problem> {
        let answer = self.client.head_bucket().bucket(&self.bucket).send().await;
        answer
            .map(drop)
            .map_err(|error| self.problem("be reached", &error))
    }

    /// Every object below `prefix`, or an error when there are more than `most`.
    pub async fn list(&self, prefix: &str, most: usize) -> Result<Vec<Object>, Problem> {
        let mut objects = Vec::new();
        let request = self.client.list_objects_v2().bucket(&self.bucket);
        let mut pages = request.prefix(prefix).into_paginator().send();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| self.problem("be listed", &error))?;
            for object in page.contents() {
                if objects.len() == most {
                    return Err(Problem::new(
                        "store_too_many",
                        "The code store holds too many files in one place",
                        format!(
                            "there are more than {most} below s3://{}/{prefix}",
                            self.bucket
                        ),
                        "Remove what does not belong there.",
                    ));
                }
                objects.push(Object {
                    key: object.key().unwrap_or_default().to_owned(),
                    bytes: u64::try_from(object.size().unwrap_or(0)).unwrap_or(0),
                    modified: time_of(object.last_modified()),
                });
            }
        }
        Ok(objects)
    }

    /// The folders directly below `prefix`, each with its whole prefix.
    pub async fn folders(&self, prefix: &str) -> Result<Vec<String>, Problem> {
        let mut folders = Vec::new();
        let request = self.client.list_objects_v2().bucket(&self.bucket);
        let request = request.prefix(prefix).delimiter("/");
        let mut pages = request.into_paginator().send();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| self.problem("be listed", &error))?;
            let found = page.common_prefixes().iter();
            folders.extend(found.filter_map(|folder| folder.prefix().map(str::to_owned)));
        }
        Ok(folders)
    }

    /// When something below `prefix` was last written; `None`: there is nothing.
    pub async fn newest(&self, prefix: &str) -> Result<Option<Timestamp>, Problem> {
        let objects = self.list(prefix, MAX_LISTED).await?;
        Ok(objects.iter().map(|object| object.modified).max())
    }

    /// Removes everything below `prefix`: a release's manifest first, without which it is none.
    pub async fn remove_all(&self, prefix: &str) -> Result<(), Problem> {
        self.remove(Manifest::key(prefix)).await?;
        self.remove_others(prefix, &BTreeSet::new()).await
    }

    /// The manifest of the release under `prefix`; `None` when there is none, and so no release.
    pub async fn manifest(&self, prefix: &str) -> Result<Option<Manifest>, Problem> {
        let key = Manifest::key(prefix);
        let request = self.client.get_object().bucket(&self.bucket).key(&key);
        let answer = match request.send().await {
            Ok(answer) => answer,
            Err(SdkError::ServiceError(error)) if error.err().is_no_such_key() => return Ok(None),
            Err(error) => return Err(self.problem(&format!("give {key}"), &error)),
        };
        let damaged = |why: String| {
            Problem::new(
                "store_damaged",
                format!("The release under {prefix} is damaged"),
                format!(
                    "its manifest s3://{}/{key} cannot be read: {why}",
                    self.bucket
                ),
                "Submit the code again to make a new release.",
            )
        };
        let body = answer.body.collect().await;
        let body = body.map_err(|error| damaged(error.to_string()))?;
        serde_json::from_slice(&body.into_bytes())
            .map(Some)
            .map_err(|error| damaged(error.to_string()))
    }

    async fn put(&self, key: String, body: Vec<u8>) -> Result<(), Problem> {
        if key.len() > MAX_KEY_BYTES {
            return Err(Problem::new(
                FILE_REFUSED,
                "The code store cannot take this file",
                format!("its key would be longer than {MAX_KEY_BYTES} bytes"),
                "Give it a shorter path.",
            ));
        }
        let attempt = patience_for(body.len());
        let time_outs = TimeoutConfig::builder()
            .connect_timeout(CONNECT_PATIENCE)
            .operation_attempt_timeout(attempt)
            .operation_timeout(attempt.max(REQUEST_PATIENCE / 2) * 2)
            .build();
        let request = self.client.put_object().bucket(&self.bucket).key(&key);
        let request = request.body(ByteStream::from(body)).customize();
        let settings = aws_sdk_s3::config::Builder::new().timeout_config(time_outs);
        match request.config_override(settings).send().await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.problem(&format!("take {key}"), &error)),
        }
    }

    async fn remove(&self, key: String) -> Result<(), Problem> {
        let request = self.client.delete_object().bucket(&self.bucket).key(&key);
        match request.send().await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.problem(&format!("remove {key}"), &error)),
        }
    }

    async fn put_all(
        &self,
        prefix: &str,
        files: &BTreeMap<RelativePath, String>,
    ) -> Result<(), Problem> {
        let mut requests = Vec::with_capacity(files.len());
        for (path, text) in files {
            let key = format!("{prefix}{}", path.as_str());
            requests.push(self.put(key, text.clone().into_bytes()));
        }
        in_parallel(requests).await
    }

    /// Removes what is below `prefix` and not among `wanted`.
    async fn remove_others(&self, prefix: &str, wanted: &BTreeSet<String>) -> Result<(), Problem> {
        let mut requests = Vec::new();
        for object in self.list(prefix, MAX_LISTED).await? {
            if !wanted.contains(&object.key) {
                requests.push(self.remove(object.key));
            }
        }
        in_parallel(requests).await
    }

    /// Makes the release whole by its manifest. That somebody else was first is as good.
    async fn seal(&self, prefix: &str, manifest: &Manifest) -> Result<(), Problem> {
        let key = Manifest::key(prefix);
        let text = serde_json::to_vec(manifest).map_err(|error| {
            Problem::new(
                "store_failed",
                "The release could not be described",
                error.to_string(),
                "Report this: it is a fault of Gantry's.",
            )
        })?;
        let request = self.client.put_object().bucket(&self.bucket).key(&key);
        let sent = request
            .if_none_match("*")
            .content_type("application/json")
            .body(ByteStream::from(text))
            .send();
        match sent.await {
            Ok(_) => Ok(()),
            Err(SdkError::ServiceError(error))
                if matches!(error.raw().status().as_u16(), 409 | 412) =>
            {
                Ok(())
            }
            Err(error) => Err(self.problem(&format!("take {key}"), &error)),
        }
    }

    async fn publish_release(
        &self,
        prefix: &str,
        files: &BTreeMap<RelativePath, String>,
        build: Option<Vec<u8>>,
    ) -> Result<(), Problem> {
        if self.manifest(prefix).await?.is_some() {
            return Ok(());
        }
        // What a publisher that died has left there belongs to no release.
        self.remove_others(prefix, &keys(prefix, files)).await?;
        self.put_all(prefix, files).await?;
        let mut manifest = Manifest::of(files);
        if let Some(build) = build {
            let file = ManifestFile::of(&build);
            manifest.files.insert(BUILD_ARCHIVE.to_owned(), file);
            self.put(format!("{prefix}{BUILD_ARCHIVE}"), build).await?;
        }
        self.seal(prefix, &manifest).await
    }

    async fn make_current(
        &self,
        repl: &ReplId,
        files: &BTreeMap<RelativePath, String>,
    ) -> Result<(), Problem> {
        let prefix = format!("code/{repl}/");
        let _alone = self.lanes[lane(repl)].lock().await;
        self.put_all(&prefix, files).await?;
        self.remove_others(&prefix, &keys(&prefix, files)).await
    }

    /// What a failed request means, in words that name the place.
    fn problem<E, R>(&self, what: &str, error: &SdkError<E, R>) -> Problem
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
        R: fmt::Debug + 'static,
    {
        let place = format!("bucket {} at {}", self.bucket, self.endpoint);
        let (cause, remediation) = match error {
            SdkError::ServiceError(error) => refused(error.err()),
            SdkError::TimeoutError(_) => (
                format!("no answer within {} s", REQUEST_PATIENCE.as_secs()),
                "Check that the store is up and that the network lets Gantry reach it.",
            ),
            other => (
                innermost(other),
                "Check AWS_ENDPOINT_URL, that the store is up, and that the network lets Gantry reach it.",
            ),
        };
        let code = match error {
            SdkError::ServiceError(error) if is_objects_own(error.err()) => FILE_REFUSED,
            _ => "store_failed",
        };
        Problem::new(
            code,
            format!("The code store could not {what} ({place})"),
            cause,
            remediation,
        )
    }
}

/// Longest wait for one try to send an object of this size.
fn patience_for(bytes: usize) -> Duration {
    let long = bytes.saturating_sub(SMALL_BYTES) >> 20;
    ATTEMPT_PATIENCE + Duration::from_secs(long as u64)
}

/// Whether it is this object that the store does not take.
fn is_objects_own(error: &impl ProvideErrorMetadata) -> bool {
    let code = error.code().unwrap_or_default();
    ["KeyTooLongError", "EntityTooLarge"].contains(&code)
}

/// Objects below one repl's or release's prefix: far above what submissions can bring, and a bound
/// on what a folder filled from outside can make this server read.
const MAX_LISTED: usize = 100_000;

async fn in_parallel(
    requests: Vec<impl Future<Output = Result<(), Problem>>>,
) -> Result<(), Problem> {
    stream::iter(requests)
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await
}

fn keys(prefix: &str, files: &BTreeMap<RelativePath, String>) -> BTreeSet<String> {
    files
        .keys()
        .map(|path| format!("{prefix}{}", path.as_str()))
        .collect()
}

/// What has no time counts as just written: nobody may take it for old.
fn time_of(modified: Option<&aws_sdk_s3::primitives::DateTime>) -> Timestamp {
    let seconds = modified.map(|time| time.secs());
    let time = seconds.and_then(|seconds| Timestamp::from_second(seconds).ok());
    time.unwrap_or_else(Timestamp::now)
}

/// What the store itself said, and what to do about it.
fn refused(error: &impl ProvideErrorMetadata) -> (String, &'static str) {
    let code = error.code().unwrap_or("no reason given");
    let remediation = match code {
        "NoSuchBucket" | "NotFound" => "Make the bucket, or set S3_BUCKET to one that is there.",
        "AccessDenied" | "Forbidden" | "403" => {
            "Allow this key s3:ListBucket on the bucket and s3:GetObject, s3:PutObject and s3:DeleteObject in it."
        }
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "ExpiredToken" => {
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION."
        }
        _ => "Look at the store's own log, then try again.",
    };
    let cause = match error.message() {
        Some(message) => format!("{code}: {message}"),
        None => code.to_owned(),
    };
    (cause, remediation)
}

/// The deepest cause: the outer ones say "dispatch failure".
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[async_trait]
impl CodeStore for S3Store {
    async fn publish_built(
        &self,
        repl: &ReplId,
        submission: SubmissionId,
        files: &BTreeMap<RelativePath, String>,
        build: Option<Vec<u8>>,
    ) -> Result<(), Problem> {
        self.publish_release(&release_prefix(repl, submission), files, build)
            .await?;
        self.make_current(repl, files).await
    }

    async fn put_current(
        &self,
        repl: &ReplId,
        path: &RelativePath,
        content: Vec<u8>,
    ) -> Result<(), Problem> {
        let _alone = self.lanes[lane(repl)].lock().await;
        self.put(format!("code/{repl}/{path}"), content).await
    }

    async fn remove_current(&self, repl: &ReplId, path: &RelativePath) -> Result<(), Problem> {
        let _alone = self.lanes[lane(repl)].lock().await;
        self.remove(format!("code/{repl}/{path}")).await
    }

    async fn remove_repl(&self, repl: &ReplId) -> Result<(), Problem> {
        let _alone = self.lanes[lane(repl)].lock().await;
        self.remove_others(&format!("code/{repl}/"), &BTreeSet::new())
            .await?;
        // Release by release: its manifest goes first, so that none is seen without some of its files.
        let all = format!("releases/{repl}/");
        for release in self.folders(&all).await? {
            self.remove_all(&release).await?;
        }
        self.remove_others(&all, &BTreeSet::new()).await
    }

    async fn has_current(&self, repl: &ReplId, path: &str) -> Result<bool, Problem> {
        let key = format!("code/{repl}/{path}");
        let request = self.client.head_object().bucket(&self.bucket).key(&key);
        match request.send().await {
            Ok(_) => Ok(true),
            Err(SdkError::ServiceError(error)) if error.err().is_not_found() => Ok(false),
            Err(error) => Err(self.problem(&format!("tell of {key}"), &error)),
        }
    }

    async fn list_current(&self, repl: &ReplId) -> Result<BTreeMap<String, u64>, Problem> {
        let prefix = format!("code/{repl}/");
        let objects = self.list(&prefix, MAX_LISTED).await?;
        let file = |object: Object| {
            let path = object.key.strip_prefix(&prefix)?;
            // Consoles show folders by empty objects with a slash at the end.
            let is_file = !path.is_empty() && !path.ends_with('/');
            is_file.then(|| (path.to_owned(), object.bytes))
        };
        Ok(objects.into_iter().filter_map(file).collect())
    }

    async fn read_current(
        &self,
        repl: &ReplId,
        path: &RelativePath,
        most: u64,
    ) -> Result<Option<Vec<u8>>, Problem> {
        let key = format!("code/{repl}/{path}");
        let request = self.client.get_object().bucket(&self.bucket).key(&key);
        let answer = match request.send().await {
            Ok(answer) => answer,
            Err(SdkError::ServiceError(error)) if error.err().is_no_such_key() => return Ok(None),
            Err(error) => return Err(self.problem(&format!("give {key}"), &error)),
        };
        let size = answer
            .content_length()
            .and_then(|size| u64::try_from(size).ok());
        if size.is_none_or(|size| size > most) {
            return Ok(None);
        }
        let body = answer.body.collect().await.map_err(|error| {
            Problem::new(
                "store_failed",
                format!("The code store did not give the whole of {key}"),
                innermost(&error),
                "Check that the store is up and that the network lets Gantry reach it.",
            )
        })?;
        Ok(Some(body.into_bytes().into()))
    }
}
