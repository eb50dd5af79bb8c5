//! The suite that holds every platform to the contract on [`Platform`]. One list of promises; a
//! backend's test calls [`all`] with a platform of its own.

mod built;
mod poison;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use jiff::Timestamp;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

use super::{
    ConfigureError, Finding, Platform, PlatformError, ReleaseSpec, RunningRelease, Sessions,
    WorkspaceSpec,
};
use crate::model::{
    Domain, Ending, Limits, Order, Reason, RelativePath, ReleaseState, ReplChange, ReplId,
    ReplState, RunReport, SUPERSEDED, Serves, SubmissionId, Tested, Tests, UserId,
};
use crate::runner::client::{Piece, Run, RunEvent, Session};
use crate::runner::confine::{SIGNALS_VERSION, landlock_version};
use crate::runner::wire::{Job, JobEvent, JobId};
use crate::storage::CodeStore;

/// Longest wait for anything here: far above what the contract allows, so that a slow machine is
/// not taken for a broken platform.
const PATIENCE: Duration = Duration::from_secs(60);

/// Pause before something is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A platform under test, with the store its releases come from.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The platform.
    pub platform: Arc<dyn Platform>,
    /// Its code store.
    pub store: Arc<dyn CodeStore>,
}

/// What a run came to.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub report: RunReport,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: Vec<u8>,
}

/// A job that runs this Python program.
pub fn python(code: &str) -> Job {
    Job {
        id: JobId {
            submission: SubmissionId::new(),
            run: 0,
        },
        files: vec![("main.py".to_owned(), code.to_owned())],
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
        env: Vec::new(),
        stdin: Vec::new(),
        stdin_open: false,
        limits: Limits::DEFAULT,
        report: false,
        output: Vec::new(),
        builds: false,
        build: None,
        online: false,
        cache: None,
    }
}

/// Follows a run to its end.
pub async fn finish(run: &mut Run) -> anyhow::Result<Ended> {
    let (mut stdout, mut stderr, mut expected) = (Vec::new(), Vec::new(), None);
    loop {
        match timeout(PATIENCE, run.next())
            .await
            .context("a run did not end")?
        {
            RunEvent::Lost(why) => anyhow::bail!("the run was lost: {why}"),
            RunEvent::Event { seq, event } => {
                ensure!(
                    expected.is_none_or(|expected| expected == seq),
                    "event {seq} where {expected:?} was due"
                );
                expected = Some(seq + 1);
                match event {
                    JobEvent::Output { stream, data } => match stream {
                        crate::model::OutputStream::Stdout => stdout.extend(data),
                        crate::model::OutputStream::Stderr => stderr.extend(data),
                    },
                    JobEvent::Ended(report) => {
                        return Ok(Ended {
                            report,
                            stdout,
                            stderr,
                        });
                    }
                }
            }
        }
    }
}

/// Every promise, one after the other. Those that the platform itself says it cannot keep on this
/// machine are left out: the ones that need what a check found missing.
pub async fn all(subject: &Subject) -> anyhow::Result<()> {
    let checks = subject.platform.checks();
    let has = |name: &str| {
        let mut found = checks.iter().filter(|check| check.name == name);
        found.all(|check| check.finding != Finding::Missing)
    };
    let context = |promise: &'static str| move || format!("promise broken: {promise}");
    a_run_ends_with_its_own_exit_code(subject)
        .await
        .with_context(context("a run ends with its own exit code"))?;
    a_sandbox_is_kept_and_made_anew(subject)
        .await
        .with_context(context(
            "a sandbox is kept, and made anew when it was dropped",
        ))?;
    poison::a_run_finds_its_folders_as_new(subject)
        .await
        .with_context(context("a run finds its folders as new"))?;
    if has("isolation") || landlock_version() >= Some(SIGNALS_VERSION) {
        poison::a_run_cannot_stop_the_next(subject)
            .await
            .with_context(context("a run cannot stop the next"))?;
    }
    if has("isolation") && subject.platform.name() == "local" {
        poison::a_run_leaves_no_ports(subject)
            .await
            .with_context(context("a run leaves no ports taken"))?;
    }
    if has("isolation") {
        users_cannot_see_each_other(subject)
            .await
            .with_context(context("users cannot see each other"))?;
    }
    a_cut_stream_loses_nothing(subject)
        .await
        .with_context(context("a cut stream loses nothing and runs nothing twice"))?;
    a_runs_memory_is_its_own(&of(subject, "conform-m"))
        .await
        .with_context(context("a run's memory is its own"))?;
    input_that_comes_before_the_program_runs_reaches_it(subject)
        .await
        .with_context(context(
            "input that comes before the program runs reaches it",
        ))?;
    a_cancelled_run_leaves_nothing_running(subject)
        .await
        .with_context(context("a cancelled run leaves nothing running"))?;
    if has("ports of released programs") {
        a_release_serves_and_takes_over(subject)
            .await
            .with_context(context(
                "a release serves, and the next takes over only when it does",
            ))?;
    }
    if has("ports of released programs") {
        variables_are_a_releases(subject)
            .await
            .with_context(context(
                "a repl's variables are applied, inherited and brought back",
            ))?;
    }
    a_domain_is_one_repls(subject)
        .await
        .with_context(context("a domain is one repl's, and a release's"))?;
    built::what_was_built_runs_and_is_released(subject)
        .await
        .with_context(context(
            "what a job built is there for those that follow, and in the release",
        ))?;
    a_program_that_ends_is_a_release(subject)
        .await
        .with_context(context("a program that ends is a release"))?;
    a_workspace_stays_whatever_its_program_does(subject)
        .await
        .with_context(context("a workspace stays, whatever its program does"))?;
    what_is_idle_comes_back_as_it_was(subject)
        .await
        .with_context(context("what is idle comes back as it was"))?;
    a_deleted_repl_is_not_brought_back(subject)
        .await
        .with_context(context(
            "a repl that was deleted is not brought back by what was sent before",
        ))?;
    a_name_is_counted_and_given_back(subject)
        .await
        .with_context(context("a name is counted for its user, and given back"))?;
    dropping_what_is_absent_is_no_error(subject)
        .await
        .with_context(context("dropping what is absent is no error"))
}

async fn a_run_ends_with_its_own_exit_code(subject: &Subject) -> anyhow::Result<()> {
    let session = Sessions::new(Arc::clone(&subject.platform)).of(&user("conform-a"));
    let job = python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)");
    let ended = finish(&mut session.start(job)).await?;
    ensure!(
        ended.report.ending == Ending::Exited(7),
        "{:?}",
        ended.report
    );
    ensure!(
        ended.stdout == b"out\n" && ended.stderr == b"err\n",
        "{ended:?}"
    );
    let mut job = python("while True: pass");
    job.limits.cpu_ms = 300;
    let ended = finish(&mut session.start(job)).await?;
    ensure!(
        ended.report.ending == Ending::Limit(Reason::Cpu),
        "{:?}",
        ended.report
    );
    Ok(())
}

async fn a_sandbox_is_kept_and_made_anew(subject: &Subject) -> anyhow::Result<()> {
    let user = user("conform-b");
    let sessions = Sessions::new(Arc::clone(&subject.platform));
    for _ in 0..2 {
        let mut run = sessions.of(&user).start(python("print(1)"));
        ensure!(finish(&mut run).await?.stdout == b"1\n");
        subject.platform.drop_sandbox(&user).await?;
    }
    subject.platform.drop_sandbox(&user).await?;
    Ok(())
}

async fn users_cannot_see_each_other(subject: &Subject) -> anyhow::Result<()> {
    let sessions = Sessions::new(Arc::clone(&subject.platform));
    let one = sessions.of(&user("conform-c"));
    let code = "import os, time\n\
                open('/tmp/mine', 'w').write('x')\n\
                print(os.readlink('/proc/self/ns/pid'), flush=True)\n\
                time.sleep(20)";
    let mut sleeper = one.start(python(code));
    let RunEvent::Event {
        event: JobEvent::Output { data: theirs, .. },
        ..
    } = sleeper.next().await
    else {
        anyhow::bail!("the first user's program did not start");
    };
    let look =
        "import os; print(os.readlink('/proc/self/ns/pid')); print(os.path.exists('/tmp/mine'))";
    let mut other = sessions.of(&user("conform-d")).start(python(look));
    let seen = finish(&mut other).await?;
    sleeper.handle().cancel();
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    let theirs = String::from_utf8_lossy(&theirs).into_owned();
    ensure!(seen.ends_with("False\n"), "it saw the other's file");
    ensure!(
        !seen.starts_with(&theirs),
        "both are in the process namespace {theirs}"
    );
    Ok(())
}

async fn a_cut_stream_loses_nothing(subject: &Subject) -> anyhow::Result<()> {
    let user = user("conform-e");
    let code = "import time\nfor i in range(20):\n    print(i, flush=True)\n    time.sleep(0.05)";
    let job = python(code);
    let id = job.id;
    let again = job.clone();
    let mut first = Sessions::new(Arc::clone(&subject.platform))
        .of(&user)
        .start(job);
    let (mut seen, mut last) = (Vec::new(), 0);
    while seen.len() < 10 {
        if let RunEvent::Event {
            seq,
            event: JobEvent::Output { data, .. },
        } = first.next().await
        {
            seen.extend(data);
            last = seq;
        }
    }
    // The server forgets everything but the job's id and the last event it stored.
    drop(first);
    let session = Sessions::new(Arc::clone(&subject.platform)).of(&user);
    let rest = finish(&mut session.attach(id, last)).await?;
    seen.extend(&rest.stdout);
    let whole: String = (0..20).map(|i| format!("{i}\n")).collect();
    ensure!(
        seen == whole.as_bytes(),
        "{}",
        String::from_utf8_lossy(&seen)
    );
    let repeated = finish(&mut session.start(again)).await?;
    ensure!(
        repeated.report == rest.report,
        "the same job ran a second time"
    );
    Ok(())
}

fn of(subject: &Subject, name: &str) -> Session {
    Sessions::new(Arc::clone(&subject.platform)).of(&user(name))
}

/// After runs for which the runner itself needs much memory: many small writes, and a large build.
pub async fn a_runs_memory_is_its_own(session: &Session) -> anyhow::Result<()> {
    let mut writes = python("import os\nfor _ in range(100_000): os.write(1, b'x')");
    writes.limits = Limits::MAXIMUM;
    let ended = finish(&mut session.start(writes)).await?;
    ensure!(ended.report.ending == Ending::Exited(0), "{ended:?}");
    ensure!(ended.stdout.len() == 100_000, "{}", ended.stdout.len());
    let mut builds = python("import os\nopen('out/large', 'wb').write(os.urandom(48 << 20))");
    builds.output = vec!["out".to_owned()];
    builds.builds = true;
    builds.limits = Limits::MAXIMUM;
    let built = builds.id;
    let ended = finish(&mut session.start(builds)).await?;
    ensure!(ended.report.ending == Ending::Exited(0), "{ended:?}");
    let mut small = python("");
    small.files[0] = ("main.sh".to_owned(), "echo x".to_owned());
    small.argv = vec!["bash".to_owned(), "main.sh".to_owned()];
    small.limits.memory_bytes = 24 << 20;
    let ended = finish(&mut session.start(small)).await?;
    session.forget(built);
    let RunReport { ending, usage, .. } = ended.report;
    ensure!(
        ending == Ending::Exited(0) && ended.stdout == b"x\n",
        "echo ended by {ending:?} with {} bytes of memory",
        usage.memory_bytes
    );
    ensure!(
        (1..24 << 20).contains(&usage.memory_bytes),
        "echo used {} bytes of memory",
        usage.memory_bytes
    );
    Ok(())
}

/// More runs than there is room for: most of them get their input while they wait for a place.
async fn input_that_comes_before_the_program_runs_reaches_it(
    subject: &Subject,
) -> anyhow::Result<()> {
    let session = Sessions::new(Arc::clone(&subject.platform)).of(&user("conform-i"));
    let mut runs = Vec::new();
    for _ in 0..20 {
        let mut job = python("import sys; print(repr(sys.stdin.read()))");
        job.stdin_open = true;
        let run = session.start(job);
        let piece = |offset, text: &'static str, eof| Piece {
            offset,
            data: text.into(),
            eof,
        };
        run.handle().stdin(piece(0, "early ", false));
        run.handle().stdin(piece(6, "input", true));
        runs.push(run);
    }
    for mut run in runs {
        let ended = finish(&mut run).await?;
        ensure!(ended.stdout == b"'early input'\n", "{ended:?}");
    }
    Ok(())
}

async fn a_cancelled_run_leaves_nothing_running(subject: &Subject) -> anyhow::Result<()> {
    let user = user("conform-f");
    let session = Sessions::new(Arc::clone(&subject.platform)).of(&user);
    // Each child holds a name that the kernel frees at its end, whoever may see its process.
    let held = SubmissionId::new();
    let code = format!("HELD = '{held}'{HOLDERS}");
    let mut job = python(&code);
    // Without namespaces the kernel counts the processes of every sandbox of the suite together.
    job.limits.processes = 256;
    let mut run = session.start(job);
    let up = timeout(PATIENCE, run.next()).await?;
    ensure!(
        matches!(&up, RunEvent::Event { event: JobEvent::Output { data, .. }, .. } if data == b"up\n"),
        "the program did not start: {up:?}"
    );
    run.handle().cancel();
    let ended = finish(&mut run).await?;
    ensure!(
        ended.report.ending == Ending::Cancelled,
        "{:?}",
        ended.report
    );
    let code = format!("HELD = '{held}'{FREE}");
    let left = finish(&mut session.start(python(&code))).await?;
    ensure!(left.stdout == b"free\n", "a child is still there: {left:?}");
    Ok(())
}

const HOLDERS: &str = "
import os, socket, time
for child in range(5):
    told, tell = os.pipe()
    if os.fork() == 0:
        os.setsid()
        held = socket.socket(socket.AF_UNIX)
        held.bind(f'\\0{HELD}-{child}')
        os.write(tell, b'x')
        time.sleep(60)
    os.read(told, 1)
print('up', flush=True)
time.sleep(60)
";

const FREE: &str = "
import socket
for child in range(5):
    socket.socket(socket.AF_UNIX).bind(f'\\0{HELD}-{child}')
print('free')
";

const SERVER: &str = "
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (VERSION + ' ' + str('DATABASE_URL' in os.environ)).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.HTTPServer(('127.0.0.1', 3000), Handler).serve_forever()
";

async fn a_release_serves_and_takes_over(subject: &Subject) -> anyhow::Result<()> {
    let repl: ReplId = "conform-repl".parse().map_err(anyhow::Error::msg)?;
    let platform = &subject.platform;
    let one = release(subject, &repl, &format!("VERSION = 'one'{SERVER}")).await??;
    ensure!(fetch(platform, &repl).await?.ends_with("one True"));
    let failed = release(subject, &repl, "import sys; sys.exit('no good')").await?;
    let Err(PlatformError::NotReady(problem)) = failed else {
        anyhow::bail!("a release that ends with exit code 1 came up: {failed:?}");
    };
    ensure!(
        problem.cause.contains("no good"),
        "the last lines are missing: {problem:?}"
    );
    ensure!(
        fetch(platform, &repl).await?.ends_with("one True"),
        "the previous release is gone"
    );
    let two = release(subject, &repl, &format!("VERSION = 'two'{SERVER}")).await??;
    ensure!(two.release > one.release);
    ensure!(fetch(platform, &repl).await?.ends_with("two True"));
    platform.rollback(&repl, None, &Order::now()).await?;
    ensure!(
        fetch(platform, &repl).await?.ends_with("one True"),
        "not rolled back"
    );
    let releases = platform.releases(&repl).await?;
    let state = |number| {
        releases
            .iter()
            .find(|r| r.release == number)
            .map(|r| r.state)
    };
    ensure!(
        state(one.release) == Some(ReleaseState::Current),
        "{releases:?}"
    );
    ensure!(
        state(two.release) == Some(ReleaseState::Superseded),
        "{releases:?}"
    );
    platform.drop_repl(&repl).await?;
    ensure!(
        platform.dial(&repl).await.is_err(),
        "a stopped repl can be reached"
    );
    Ok(())
}

const SHOWS_VARIABLES: &str = "
import os
if os.environ.get('COLOUR') == 'broken':
    raise SystemExit('no such colour')
VERSION = ' '.join(os.environ.get(name, 'none') for name in ('COLOUR', 'TOKEN'))
";

fn variables(body: serde_json::Value) -> anyhow::Result<ReplChange> {
    Ok(ReplChange::Variables(serde_json::from_value(body)?))
}

async fn variables_are_a_releases(subject: &Subject) -> anyhow::Result<()> {
    let repl: ReplId = "conform-given".parse().map_err(anyhow::Error::msg)?;
    let platform = &subject.platform;
    let code = format!("{SHOWS_VARIABLES}{SERVER}");
    let shows = async |expected: &str| {
        let page = fetch(platform, &repl).await?;
        ensure!(page.contains(expected), "{expected:?} is not shown: {page}");
        Ok(())
    };
    let one = release(subject, &repl, &code).await??;
    shows("none none").await?;
    let red = json!({ "env": { "COLOUR": "red" }, "secrets": { "TOKEN": "hush" } });
    let settings = platform.configure(&repl, &variables(red)?).await?;
    ensure!(settings.secrets == ["TOKEN"] && settings.env["COLOUR"] == "red");
    shows("red hush").await?;
    ensure!(
        !format!("{settings:?}").contains("hush"),
        "a secret is told: {settings:?}"
    );
    // The next release begins with them, and has its own from then on.
    release(subject, &repl, &code).await??;
    shows("red hush").await?;
    let blue = json!({ "env": { "COLOUR": "blue" }, "secrets": { "TOKEN": null } });
    platform.configure(&repl, &variables(blue)?).await?;
    shows("blue hush").await?;
    let broken = variables(json!({ "env": { "COLOUR": "broken" } }))?;
    let failed = platform.configure(&repl, &broken).await;
    let Err(ConfigureError::Failed(PlatformError::NotReady(problem))) = failed else {
        anyhow::bail!("a program came up with variables it ends with: {failed:?}");
    };
    ensure!(problem.cause.contains("no such colour"), "{problem:?}");
    shows("blue hush").await?;
    ensure!(platform.settings(&repl).await?.env["COLOUR"] == "blue");
    let unknown = variables(json!({ "secrets": { "OTHER": null } }))?;
    ensure!(matches!(
        platform.configure(&repl, &unknown).await,
        Err(ConfigureError::Refused(_))
    ));
    platform
        .rollback(&repl, Some(one.release), &Order::now())
        .await?;
    shows("red hush").await?;
    ensure!(platform.settings(&repl).await?.env["COLOUR"] == "red");
    platform.drop_repl(&repl).await?;
    // What does not run has them at its next start.
    platform
        .configure(&repl, &variables(json!({ "secrets": {} }))?)
        .await?;
    release(subject, &repl, &code).await??;
    shows("red none").await?;
    platform.drop_repl(&repl).await?;
    let nobody: ReplId = "conform-nobody".parse().map_err(anyhow::Error::msg)?;
    ensure!(platform.settings(&nobody).await.is_err());
    Ok(())
}

async fn a_domain_is_one_repls(subject: &Subject) -> anyhow::Result<()> {
    let repl = |name: &str| name.parse::<ReplId>().map_err(anyhow::Error::msg);
    let (one, other) = (repl("conform-named")?, repl("conform-other")?);
    let platform = &subject.platform;
    let name = async |repl: &ReplId, names: &[&str]| -> anyhow::Result<_> {
        let domains = names.iter().map(|name| name.parse::<Domain>());
        let domains = domains
            .collect::<Result<_, _>>()
            .map_err(anyhow::Error::msg)?;
        let change = ReplChange::Domains(domains);
        Ok(platform.configure(repl, &change).await)
    };
    let hosts = [
        "a.conform.example",
        "b.conform.example",
        "c.conform.example",
    ];
    let [a, b, c] = hosts;
    let has = |host: &str| platform.repl_of(host);
    for repl in [&one, &other] {
        release(subject, repl, "print('Hello')").await??;
        name(repl, &[]).await??;
    }
    ensure!(has(a).is_none());
    let settings = name(&one, &[a, b]).await??;
    ensure!(
        settings.domains.iter().map(Domain::as_str).eq([a, b]),
        "{settings:?}"
    );
    ensure!(has(a).as_ref() == Some(&one) && has(b).as_ref() == Some(&one));
    // All or nothing.
    let refused = name(&other, &[c, a]).await?;
    let Err(ConfigureError::Failed(PlatformError::NotReady(problem))) = refused else {
        anyhow::bail!("two repls have one host name: {refused:?}");
    };
    ensure!(problem.code == "domain_taken", "{problem:?}");
    ensure!(has(a).as_ref() == Some(&one) && has(c).is_none());
    let (all, last) = ([a, b, c], [c]);
    let (first, second) = tokio::join!(name(&one, &all), name(&other, &last));
    let (first, second) = (first?, second?);
    ensure!(first.is_ok() != second.is_ok(), "{first:?} and {second:?}");
    name(&other, &[]).await??;
    name(&one, &[a, b]).await??;
    // A release has those of the one before; what was removed since can be another's.
    release(subject, &one, "print('Hello again')").await??;
    ensure!(has(a).as_ref() == Some(&one));
    name(&one, &[]).await??;
    ensure!(has(a).is_none());
    name(&other, &[b]).await??;
    platform.rollback(&one, None, &Order::now()).await?;
    ensure!(
        has(a).as_ref() == Some(&one),
        "a domain did not come back with its release"
    );
    ensure!(
        has(b).as_ref() == Some(&other),
        "a rollback took another's domain"
    );
    let settings = platform.settings(&one).await?;
    ensure!(
        settings.domains.iter().map(Domain::as_str).eq([a]),
        "{settings:?}"
    );
    for repl in [&one, &other] {
        name(repl, &[]).await??;
        platform.drop_repl(repl).await?;
    }
    ensure!(hosts.iter().all(|host| has(host).is_none()));
    Ok(())
}

async fn a_program_that_ends_is_a_release(subject: &Subject) -> anyhow::Result<()> {
    let repl: ReplId = "conform-ends".parse().map_err(anyhow::Error::msg)?;
    let platform = &subject.platform;
    let failed = release(subject, &repl, "import sys; sys.exit('no good')").await?;
    let Err(PlatformError::NotReady(problem)) = failed else {
        anyhow::bail!("a release that ends with exit code 1 came up: {failed:?}");
    };
    ensure!(problem.cause.contains("no good"), "{problem:?}");
    let ended = release(subject, &repl, "print('Hello & <goodbye>')").await??;
    let page = fetch(platform, &repl).await?;
    ensure!(
        page.contains("200 OK") && page.contains("Hello &amp; &lt;goodbye&gt;"),
        "{page}"
    );
    let status = platform
        .repls()
        .await?
        .into_iter()
        .find(|r| r.repl_id == repl);
    let status = status.context("the repl is not listed")?;
    ensure!(status.state == ReplState::Exited(0), "{status:?}");
    ensure!(status.release == Some(ended.release), "{status:?}");
    platform.drop_repl(&repl).await?;
    ensure!(
        platform.dial(&repl).await.is_err(),
        "a stopped repl can be reached"
    );
    Ok(())
}

async fn a_workspace_stays_whatever_its_program_does(subject: &Subject) -> anyhow::Result<()> {
    let repl: ReplId = "conform-open".parse().map_err(anyhow::Error::msg)?;
    let platform = &subject.platform;
    let spec = |user_id: UserId| WorkspaceSpec {
        user_id,
        repl_id: repl.clone(),
        order: Order::now(),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
    };
    let code = "print('Hello, workspace', flush=True)\nraise SystemExit(3)";
    let path = RelativePath::try_from("main.py".to_owned()).map_err(anyhow::Error::msg)?;
    let files = BTreeMap::from([(path, code.to_owned())]);
    let store = &subject.store;
    store.publish(&repl, SubmissionId::new(), &files).await?;
    // At the same time, as impatient people do it.
    let own = spec(user("conform-h"));
    let (one, other) = tokio::join!(platform.open_workspace(&own), platform.open_workspace(&own));
    let (one, other) = (one?, other?);
    ensure!(
        one.created != other.created,
        "made by {one:?} and {other:?}"
    );
    ensure!(one.url == other.url && one.terminal_url.starts_with("ws://conform-open."));
    ended_page(platform, &repl, "exit code 3").await?;
    ensure!(
        platform.releases(&repl).await?.is_empty(),
        "it became a release"
    );
    let theirs = platform.open_workspace(&spec(user("conform-d"))).await;
    ensure!(
        matches!(theirs, Err(PlatformError::NotFound(_))),
        "{theirs:?}"
    );
    platform.drop_repl(&repl).await?;
    ensure!(platform.dial(&repl).await.is_err(), "it was not stopped");
    ensure!(
        platform.open_workspace(&own).await?.created,
        "it did not open again"
    );
    let page = ended_page(platform, &repl, "exit code 3").await?;
    ensure!(page.contains("Hello, workspace"), "{page}");
    let strangers = fetch(platform, &repl).await?;
    ensure!(
        strangers.contains(" 502 ") && !strangers.contains("Hello"),
        "strangers read what it wrote: {strangers}"
    );
    platform.drop_repl(&repl).await?;
    Ok(())
}

async fn what_is_idle_comes_back_as_it_was(subject: &Subject) -> anyhow::Result<()> {
    let repl: ReplId = "conform-idle".parse().map_err(anyhow::Error::msg)?;
    let platform = &subject.platform;
    let long_ago = Timestamp::UNIX_EPOCH;
    release(subject, &repl, "print('one')").await??;
    let two = release(subject, &repl, "print('two')").await??;
    ensure!(
        !platform.stop_idle(&repl, long_ago, long_ago).await? && !platform.is_idle(&repl),
        "it was stopped, though it was started after the time named"
    );
    ensure!(!platform.wake(&repl).await?, "it was woken while it ran");
    // Of two that find it idle at the same time, one stops it.
    let now = Timestamp::now();
    let (one, other) = tokio::join!(
        platform.stop_idle(&repl, now, now),
        platform.stop_idle(&repl, now, now)
    );
    ensure!(one? != other?, "both stopped it, or neither did");
    ensure!(platform.is_idle(&repl) && platform.dial(&repl).await.is_err());
    let repls = platform.repls().await?;
    let status = repls.into_iter().find(|one| one.repl_id == repl);
    let status = status.context("the repl is not listed")?;
    let cause = status.cause.clone().unwrap_or_default();
    ensure!(
        status.state == ReplState::Idle && cause.starts_with("stopped: idle since "),
        "{status:?}"
    );
    ensure!(
        status.release == Some(two.release) && status.replicas == 0,
        "{status:?}"
    );
    let (one, other) = tokio::join!(platform.wake(&repl), platform.wake(&repl));
    ensure!(one? != other?, "both woke it, or neither did");
    ensure!(!platform.is_idle(&repl));
    ended_page(platform, &repl, "two").await?;
    // A start is as good as a request, and a rollback goes to the one before.
    ensure!(platform.stop_idle(&repl, now, Timestamp::now()).await?);
    let own = WorkspaceSpec {
        user_id: user("conform-g"),
        repl_id: repl.clone(),
        order: Order::now(),
        argv: vec!["python3".to_owned(), "-V".to_owned()],
    };
    ensure!(
        platform.open_workspace(&own).await?.created,
        "it was not woken"
    );
    ended_page(platform, &repl, "two").await?;
    ensure!(platform.stop_idle(&repl, now, Timestamp::now()).await?);
    platform.rollback(&repl, None, &Order::now()).await?;
    ended_page(platform, &repl, "one").await?;
    ensure!(platform.stop_idle(&repl, now, Timestamp::now()).await?);
    platform.drop_repl(&repl).await?;
    ensure!(!platform.is_idle(&repl), "a stopped repl waits to be woken");
    platform.wake(&repl).await.ok();
    ensure!(
        platform.dial(&repl).await.is_err(),
        "a stopped repl was woken"
    );
    Ok(())
}

/// The repl's page, once it says so to the repl's owner.
async fn ended_page(
    platform: &Arc<dyn Platform>,
    repl: &ReplId,
    says: &str,
) -> anyhow::Result<String> {
    let started = Instant::now();
    loop {
        let page = async {
            let until = u64::try_from(Timestamp::now().as_second())? + 60;
            let ticket = platform.ticket_key(repl).await?.issue(repl, until);
            fetch_from(platform, repl, &format!("/?ticket={ticket}")).await
        };
        match page.await {
            Ok(page) if page.contains(says) => return Ok(page),
            other => ensure!(
                started.elapsed() < PATIENCE,
                "no page with {says:?}: {other:?}"
            ),
        }
        sleep(LOOK_AGAIN).await;
    }
}

async fn a_deleted_repl_is_not_brought_back(subject: &Subject) -> anyhow::Result<()> {
    let repl: ReplId = "conform-gone".parse().map_err(anyhow::Error::msg)?;
    let platform = &subject.platform;
    let (own, other) = (user("conform-g"), user("conform-m"));
    release(subject, &repl, "print('one')").await??;
    let path = RelativePath::try_from("main.py".to_owned()).map_err(anyhow::Error::msg)?;
    let files = BTreeMap::from([(path, "print('late')".to_owned())]);
    let sent = |user_id: &UserId| ReleaseSpec {
        user_id: user_id.clone(),
        repl_id: repl.clone(),
        submission_id: SubmissionId::new(),
        order: Order::now(),
        tested: Tested::of(&files, &Tests::ExitCode),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
        env: BTreeMap::new(),
        database: false,
        serves: Serves::Unknown,
    };
    let (before, theirs) = (sent(&own), sent(&other));
    let refused = async || {
        let released = platform.ensure_release(&before).await;
        ensure!(
            matches!(&released, Err(PlatformError::NotReady(problem)) if problem.code == SUPERSEDED),
            "it was released: {released:?}"
        );
        ensure!(platform.overtaken(&before).await?.is_some());
        Ok(())
    };
    platform.ordered(&repl, &Order::now()).await?;
    platform.drop_repl(&repl).await?;
    platform.forget(&repl).await?;
    refused().await?;
    ensure!(platform.owner(&repl).await?.is_none(), "its name is taken");
    // Also when its name is its owner's again, and when it was given back.
    ensure!(platform.claim(&repl, &own).await? == own);
    refused().await?;
    platform.forget_unused(&repl).await?;
    refused().await?;
    ensure!(platform.owner(&repl).await?.is_none(), "its name is taken");
    // It was not asked of another's.
    let store = &subject.store;
    store.publish(&repl, theirs.submission_id, &files).await?;
    ensure!(platform.ensure_release(&theirs).await?.release == 1);
    ended_page(platform, &repl, "late").await?;
    platform.drop_repl(&repl).await?;
    store.remove_repl(&repl).await?;
    platform.forget(&repl).await?;
    Ok(())
}

async fn a_name_is_counted_and_given_back(subject: &Subject) -> anyhow::Result<()> {
    let repl: ReplId = "conform-name".parse().map_err(anyhow::Error::msg)?;
    let platform = &subject.platform;
    let (one, other) = (user("conform-n"), user("conform-m"));
    platform.forget(&repl).await?;
    ensure!(platform.claim(&repl, &one).await? == one);
    ensure!(platform.claim(&repl, &other).await? == one);
    ensure!((platform.names(&one).await?, platform.names(&other).await?) == (1, 0));
    platform.forget_unused(&repl).await?;
    ensure!(platform.owner(&repl).await?.is_none() && platform.names(&one).await? == 0);
    ensure!(platform.claim(&repl, &other).await? == other);
    let theirs = ReleaseSpec {
        user_id: one.clone(),
        repl_id: repl.clone(),
        submission_id: SubmissionId::new(),
        order: Order::now(),
        tested: Tested::of(&BTreeMap::new(), &Tests::ExitCode),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
        env: BTreeMap::new(),
        database: false,
        serves: Serves::Unknown,
    };
    ensure!(
        platform.ensure_release(&theirs).await.is_err(),
        "released under another's name"
    );
    let path = RelativePath::try_from("main.py".to_owned()).map_err(anyhow::Error::msg)?;
    let files = BTreeMap::from([(path, "print('secret')".to_owned())]);
    let store = &subject.store;
    store.publish(&repl, SubmissionId::new(), &files).await?;
    let own = WorkspaceSpec {
        user_id: other.clone(),
        repl_id: repl.clone(),
        order: Order::now(),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
    };
    platform.open_workspace(&own).await?;
    platform.forget_unused(&repl).await?;
    ensure!(platform.owner(&repl).await? == Some(other));
    platform.drop_repl(&repl).await?;
    store.remove_repl(&repl).await?;
    ensure!(!store.has_current(&repl, "main.py").await?);
    platform.forget(&repl).await?;
    ensure!(platform.owner(&repl).await?.is_none() && platform.releases(&repl).await.is_err());
    Ok(())
}

async fn dropping_what_is_absent_is_no_error(subject: &Subject) -> anyhow::Result<()> {
    let nobody: ReplId = "conform-nobody".parse().map_err(anyhow::Error::msg)?;
    subject.platform.drop_repl(&nobody).await?;
    subject
        .platform
        .drop_sandbox(&user("conform-nobody"))
        .await?;
    ensure!(subject.platform.owner(&nobody).await?.is_none());
    ensure!(subject.platform.releases(&nobody).await.is_err());
    Ok(())
}

async fn release(
    subject: &Subject,
    repl: &ReplId,
    code: &str,
) -> anyhow::Result<Result<RunningRelease, PlatformError>> {
    let submission_id = SubmissionId::new();
    let path = RelativePath::try_from("main.py".to_owned()).map_err(anyhow::Error::msg)?;
    let files = BTreeMap::from([(path, code.to_owned())]);
    subject.store.publish(repl, submission_id, &files).await?;
    let spec = ReleaseSpec {
        user_id: user("conform-g"),
        repl_id: repl.clone(),
        submission_id,
        order: Order::now(),
        tested: Tested::of(&files, &Tests::ExitCode),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
        env: BTreeMap::new(),
        database: true,
        serves: Serves::Unknown,
    };
    let released = subject.platform.ensure_release(&spec).await;
    if let Ok(running) = &released {
        let again = subject.platform.ensure_release(&spec).await?;
        ensure!(
            again.release == running.release,
            "the same submission was released twice"
        );
    }
    Ok(released)
}

async fn fetch(platform: &Arc<dyn Platform>, repl: &ReplId) -> anyhow::Result<String> {
    fetch_from(platform, repl, "/").await
}

async fn fetch_from(
    platform: &Arc<dyn Platform>,
    repl: &ReplId,
    path: &str,
) -> anyhow::Result<String> {
    let mut stream = platform.dial(repl).await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await??;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn user(name: &str) -> UserId {
    match name.parse() {
        Ok(user) => user,
        Err(_) => unreachable!("names in this file are labels"),
    }
}
