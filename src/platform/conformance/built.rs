//! What a job built.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, ensure};

use super::{Subject, ended_page, finish, python, user};
use crate::model::{BUILD_FOLDER, Ending, Limits, Order, ReplId, Serves, Tested, Tests};
use crate::platform::{ReleaseSpec, Sessions};
use crate::runner::client::Session;
use crate::runner::wire::{Job, JobId};

/// Builds a program, without a compiler: every platform has Python.
const BUILDER: &str = "import os
assert os.listdir('.build') == []
with open('.build/script', 'w') as script:
    script.write('#!/bin/sh\\necho built by a $1\\n')
os.chmod('.build/script', 0o755)
os.symlink('script', '.build/program')
open('not kept', 'w')
";

fn builder(code: &str) -> Job {
    let mut job = python(code);
    job.output = vec![BUILD_FOLDER.to_owned()];
    job.limits = Limits::COMPILE;
    job
}

/// Runs what `build` left, as the submission's `run`.
async fn outcome(session: &Session, build: JobId, run: u32) -> anyhow::Result<(Ending, String)> {
    let mut job = python("");
    job.id.submission = build.submission;
    job.id.run = run;
    job.argv = program();
    job.build = Some(build);
    let ended = finish(&mut session.start(job)).await?;
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    Ok((ended.report.ending, said))
}

fn program() -> Vec<String> {
    [".build/program", "test"].map(str::to_owned).to_vec()
}

pub(super) async fn what_was_built_runs_and_is_released(subject: &Subject) -> anyhow::Result<()> {
    let user = user("conform-b");
    let session = Sessions::new(Arc::clone(&subject.platform)).of(&user);
    let job = builder(BUILDER);
    let build = job.id;
    let ended = finish(&mut session.start(job)).await?;
    ensure!(ended.report.ending == Ending::Exited(0), "{ended:?}");
    for run in 1..3 {
        let (ending, said) = outcome(&session, build, run).await?;
        ensure!(
            ending == Ending::Exited(0) && said == "built by a test\n",
            "{ending:?}: {said}"
        );
    }
    let archive = session.build(build).await.map_err(anyhow::Error::msg)?;
    let repl: ReplId = "conform-built".parse().map_err(anyhow::Error::msg)?;
    let files = BTreeMap::new();
    let published = subject
        .store
        .publish_built(&repl, build.submission, &files, Some(archive));
    published.await?;
    let spec = ReleaseSpec {
        user_id: user,
        repl_id: repl.clone(),
        submission_id: build.submission,
        order: Order::now(),
        tested: Tested::of(&files, &Tests::ExitCode),
        argv: program(),
        env: BTreeMap::new(),
        database: false,
        serves: Serves::Unknown,
    };
    let released = subject.platform.ensure_release(&spec).await;
    released.context("what was built does not run when it is released")?;
    let page = ended_page(&subject.platform, &repl, "exit code 0").await?;
    ensure!(page.contains("built by a test"), "{page}");
    subject.platform.drop_repl(&repl).await?;
    session.forget(build);
    ensure!(session.build(build).await.is_err(), "it was not forgotten");
    let (ending, _) = outcome(&session, build, 3).await?;
    ensure!(matches!(ending, Ending::NotStarted(_)), "{ending:?}");
    let failed = builder("open('.build/half', 'w'); raise SystemExit(1)");
    let build = failed.id;
    finish(&mut session.start(failed)).await?;
    ensure!(session.build(build).await.is_err(), "half a build was kept");
    let large = builder("open('.build/large', 'wb').write(__import__('os').urandom(100 << 20))");
    let ended = finish(&mut session.start(large)).await?;
    let limit = Ending::Limit(crate::model::Reason::Disk);
    ensure!(ended.report.ending == limit, "{ended:?}");
    Ok(())
}
