//! `gantry-runner fetch [FOLDER] [PORT]`: the init container of a released pod. It waits on the pod's loopback
//! address until the server brings a list of files, each with a URL that reads that file for a few minutes, and
//! copies them into a folder, which nothing in the list can make it leave. It has no key of the bucket.
//!
//! The server comes to the pod and not the other way round: so no pod needs a way to the server, a pod that
//! starts again days later gets new URLs, and one that starts while the server is away waits for it.

use std::cell::Cell;
use std::fs;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use reqwest::{Certificate, Client, redirect};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use super::PROGRAM;
use super::slot::mode_of;
use crate::beneath::{self, Folder};
use crate::model::{Problem, RelativePath};
use crate::storage::{
    FETCH_GREETING, FETCH_PORT, FETCH_TAKEN, GrantedFile, INCOMPLETE, MAX_OFFER_BYTES, Offer,
    REFUSED, hexadecimal,
};

/// Where to, when nothing is said.
const DEFAULT_FOLDER: &str = "/workspace";

/// Most bytes of all files together: half of the volume that the template gives the workspace.
const MAX_BYTES: u64 = 256 << 20;

/// Longest wait for the server. A server that is being replaced is back within a minute; after this the container
/// ends and is started again, so that the cluster's events show that something is wrong.
const SERVER_PATIENCE: Duration = Duration::from_secs(5 * 60);

/// Longest wait for one list, once the server is connected: it asks the store first.
const OFFER_PATIENCE: Duration = Duration::from_secs(60);

/// Longest time for copying everything. A release has 60 s to come up, and its program needs some of it; a store
/// that is slower than this is reported before that ends.
const PATIENCE: Duration = Duration::from_secs(45);

/// Longest wait for a connection to the store, and for the next piece of a file.
const CONNECT_PATIENCE: Duration = Duration::from_millis(3_100);
const PIECE_PATIENCE: Duration = Duration::from_secs(10);

/// Files at one time.
const PARALLEL: usize = 16;

/// Tries of one file, and the pause after the first, which doubles: 8 s of pauses in all.
const TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// The code of a problem that another try may get over.
const CUT: &str = "fetch_cut";

/// What kept it from copying. Each has an exit code of its own, by which a cluster's events and
/// scripts can tell them apart.
enum Failure {
    /// It was started wrongly.
    Configuration(Problem),
    /// The server did not come, or the store did not give what it was asked for, in time or at all.
    Store(Problem),
    /// There is nothing there, or only a part of a release.
    Incomplete(Problem),
    /// What is there may not be copied: it would leave the folder, or is too much.
    Refused(Problem),
    /// The folder does not take it.
    Folder(Problem),
}

impl Failure {
    fn told(self) -> (u8, Problem) {
        match self {
            Failure::Configuration(problem) => (2, problem),
            Failure::Store(problem) => (3, problem),
            Failure::Incomplete(problem) => (4, problem),
            Failure::Refused(problem) => (5, problem),
            Failure::Folder(problem) => (6, problem),
        }
    }

    /// What the server found when it asked the store.
    fn of_server(problem: Problem) -> Self {
        match problem.code.as_str() {
            INCOMPLETE => Failure::Incomplete(problem),
            REFUSED | "store_too_many" => Failure::Refused(problem),
            _ => Failure::Store(problem),
        }
    }
}

/// `gantry-runner fetch [FOLDER] [PORT]`. Another port is for tests: in a pod the server knows the usual one.
pub fn main(folder: Option<String>, port: Option<String>) -> ExitCode {
    let folder = folder.unwrap_or_else(|| DEFAULT_FOLDER.to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(fetch(&folder, port.as_deref())),
        Err(error) => Err(Failure::Folder(Problem::new(
            "fetch_failed",
            "The copy could not begin",
            error.to_string(),
            "Give the container more memory and processes.",
        ))),
    };
    match result {
        Ok((files, bytes)) => {
            eprintln!("{PROGRAM} fetch: {files} files, {bytes} bytes to {folder}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            let (code, problem) = failure.told();
            eprintln!(
                "{PROGRAM} fetch: {}: {}. {}",
                problem.message, problem.cause, problem.remediation
            );
            ExitCode::from(code)
        }
    }
}

async fn fetch(folder: &str, port: Option<&str>) -> Result<(usize, u64), Failure> {
    let port = port
        .map_or(Ok(FETCH_PORT), str::parse)
        .map_err(|_| configuration("its port is not a number".to_owned(), "Leave the port out."))?;
    let top = open_folder(folder)?;
    let (place, files) = match offered(port).await? {
        Offer::Files { place, files } => (place, files),
        Offer::Refused(problem) => return Err(Failure::of_server(problem)),
    };
    let copied = timeout(PATIENCE, copy(&place, &files, &top)).await;
    copied.unwrap_or_else(|_| {
        Err(Failure::Store(Problem::new(
            "fetch_timeout",
            format!("{place} was not copied in time"),
            format!("it took longer than {} s", PATIENCE.as_secs()),
            "Look at how the store and the way to it are doing.",
        )))
    })
}

fn configuration(cause: String, remediation: &str) -> Failure {
    let message = "The copy could not begin";
    Failure::Configuration(Problem::new("fetch_config", message, cause, remediation))
}

/// What the server offers: the first whole list that comes.
async fn offered(port: u16) -> Result<Offer, Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
    let listener = listener.map_err(|error| {
        configuration(
            format!("port {port} of the pod cannot be listened on: {error}"),
            "Let no other container of the pod use this port.",
        )
    })?;
    eprintln!("{PROGRAM} fetch: waiting for the server to name the files");
    let offered = async {
        loop {
            let why = match listener.accept().await {
                Ok((stream, _)) => match timeout(OFFER_PATIENCE, take(stream)).await {
                    Ok(Ok(offer)) => return offer,
                    Ok(Err(why)) => why,
                    Err(_) => format!("no list within {} s", OFFER_PATIENCE.as_secs()),
                },
                Err(error) => {
                    sleep(FIRST_PAUSE).await;
                    error.to_string()
                }
            };
            eprintln!("{PROGRAM} fetch: {why}; waiting again");
        }
    };
    timeout(SERVER_PATIENCE, offered).await.map_err(|_| {
        Failure::Store(Problem::new(
            "fetch_no_server",
            "The server did not name the files",
            format!("nothing came within {} s", SERVER_PATIENCE.as_secs()),
            "Check that the Gantry server runs and that its account may use pods/portforward; the pod tries again by itself.",
        ))
    })
}

/// One list from one connection.
async fn take(mut stream: TcpStream) -> Result<Offer, String> {
    let (read, mut write) = stream.split();
    let broken = |error: std::io::Error| format!("the connection broke: {error}");
    write
        .write_all(FETCH_GREETING.as_bytes())
        .await
        .map_err(broken)?;
    let mut line = Vec::new();
    let mut read = BufReader::new(read.take(MAX_OFFER_BYTES as u64));
    read.read_until(b'\n', &mut line).await.map_err(broken)?;
    if line.pop() != Some(b'\n') {
        return Err(format!("the list broke off after {} bytes", line.len()));
    }
    let offer = serde_json::from_slice(&line)
        .map_err(|error| format!("the list cannot be read: {error}"))?;
    write
        .write_all(FETCH_TAKEN.as_bytes())
        .await
        .map_err(broken)?;
    write.shutdown().await.map_err(broken)?;
    Ok(offer)
}

async fn copy(place: &str, files: &[GrantedFile], top: &Folder) -> Result<(usize, u64), Failure> {
    let mut wanted = Vec::with_capacity(files.len());
    for file in files {
        let path = RelativePath::try_from(file.path.clone());
        wanted.push((path.map_err(|why| refused(place, why))?, file));
    }
    let http = client(files)?;
    let copied = Cell::new(0);
    let mut copies = Vec::with_capacity(wanted.len());
    for (path, file) in &wanted {
        copies.push(copy_surely(&http, top, path, file, &copied));
    }
    stream::iter(copies)
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await?;
    Ok((wanted.len(), copied.get()))
}

/// A client that goes to the URLs of the list and nowhere else.
fn client(files: &[GrantedFile]) -> Result<Client, Failure> {
    let mut builder = Client::builder()
        .redirect(redirect::Policy::none())
        .no_proxy()
        .connect_timeout(CONNECT_PATIENCE)
        .read_timeout(PIECE_PATIENCE);
    if files.iter().any(|file| file.url.starts_with("https:")) {
        // Beside the public authorities those of the image: a store of one's own may have a certificate of one's own.
        for certificate in rustls_native_certs::load_native_certs().certs {
            if let Ok(certificate) = Certificate::from_der(&certificate) {
                builder = builder.add_root_certificate(certificate);
            }
        }
    }
    builder.build().map_err(|error| {
        configuration(
            innermost(&error),
            "Check the certificates in the runner image.",
        )
    })
}

fn refused(place: &str, cause: String) -> Failure {
    Failure::Refused(Problem::new(
        REFUSED,
        format!("{place} is not copied"),
        cause,
        "Put only files with relative paths there, within the bounds.",
    ))
}

/// The deepest cause: the outer ones name the URL, and who has the URL may read the file.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn cut(file: &GrantedFile, cause: String) -> Failure {
    let message = format!("The code store did not give {}", file.path);
    let remediation = "Check that the store is up and that the network lets pods reach it; the pod tries again by itself.";
    Failure::Store(Problem::new(CUT, message, cause, remediation))
}

/// Copies one file, again when the store does not answer or the stream breaks off.
async fn copy_surely(
    http: &Client,
    top: &Folder,
    path: &RelativePath,
    file: &GrantedFile,
    copied: &Cell<u64>,
) -> Result<(), Failure> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        // Of this file only: others are copied at the same time.
        let bytes = Cell::new(0);
        match copy_one(http, top, path, file, copied, &bytes).await {
            Err(Failure::Store(problem)) if problem.code == CUT => {
                eprintln!("{PROGRAM} fetch: {problem}; again in {pause:?}");
                copied.set(copied.get() - bytes.get());
                sleep(pause).await;
                pause *= 2;
            }
            result => return result,
        }
    }
    copy_one(http, top, path, file, copied, &Cell::new(0)).await
}

async fn copy_one(
    http: &Client,
    top: &Folder,
    path: &RelativePath,
    file: &GrantedFile,
    copied: &Cell<u64>,
    bytes: &Cell<u64>,
) -> Result<(), Failure> {
    let mut target = create(top, path)?;
    let answer = http.get(&file.url).send().await;
    let answer = answer.map_err(|error| cut(file, innermost(&error.without_url())))?;
    let status = answer.status();
    if status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
        return Err(cut(file, format!("it answered {status}")));
    }
    if status != reqwest::StatusCode::OK {
        return Err(Failure::Store(Problem::new(
            "fetch_denied",
            format!("The code store did not give {}", file.path),
            format!("it answered {status}"),
            "The pod tries again with new URLs; if that goes on, check the store's clock, and that the server's key may read the bucket.",
        )));
    }
    let mut body = answer.bytes_stream();
    let mut digest = Sha256::new();
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| {
            let why = innermost(&error.without_url());
            cut(
                file,
                format!("it broke off after {} bytes: {why}", bytes.get()),
            )
        })?;
        if bytes.get() == 0 && mode_of(&piece) & 0o111 != 0 {
            // The pod's program reads it under another user id.
            let set = beneath::set_mode(&target, 0o777);
            set.map_err(|error| cannot_write(path.as_str(), error.to_string()))?;
        }
        bytes.set(bytes.get() + piece.len() as u64);
        copied.set(copied.get() + piece.len() as u64);
        if copied.get() > MAX_BYTES {
            let why = format!("it is more than {MAX_BYTES} bytes in all");
            return Err(refused(&file.path, why));
        }
        digest.update(&piece);
        let written = target.write_all(&piece);
        written.map_err(|error| cannot_write(path.as_str(), error.to_string()))?;
    }
    if let Some(expected) = &file.expected
        && (expected.bytes != bytes.get() || expected.sha256 != hexadecimal(&digest.finalize()))
    {
        return Err(Failure::Incomplete(Problem::new(
            "fetch_changed",
            format!("{} is not what was tested", file.path),
            "its content is not the one in the release's manifest",
            "Somebody changed it in the bucket. Submit the code again.",
        )));
    }
    Ok(())
}

fn open_folder(folder: &str) -> Result<Folder, Failure> {
    Folder::open(Path::new(folder)).map_err(|error| cannot_write(folder, error.to_string()))
}

fn cannot_write(path: &str, cause: String) -> Failure {
    Failure::Folder(Problem::new(
        "fetch_folder",
        format!("{path} could not be written"),
        cause,
        "Mount a volume there that this user may write to and that is large enough.",
    ))
}

/// Makes the file and the folders above it. One that a first try of this container left is replaced.
fn create(top: &Folder, path: &RelativePath) -> Result<fs::File, Failure> {
    let path = path.as_str();
    let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
    let made = || {
        let above = top.make(folders, None)?;
        match above.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        above.create(name, 0o666)
    };
    made().map_err(|error| cannot_write(path, error.to_string()))
}
