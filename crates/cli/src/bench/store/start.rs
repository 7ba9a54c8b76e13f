//! How long a store with many objects takes to be there.

use super::super::bar;
use super::super::measure::Runs;
use super::nodes::Node;
use super::objects;
use super::peers::forget;
use super::times::{Promise, Wanted};
use anyhow::Context as _;
use serde::Serialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Most rounds: a start reads every file.
const ROUNDS: usize = 3;
/// Objects between two steps of the progress bar.
const STEP: usize = 1000;

/// Starts of a store that was killed, from the process's start until it answers.
#[derive(Debug, Serialize)]
pub(crate) struct Start {
    pub(crate) objects: usize,
    /// The first one also makes the index.
    pub(crate) first_seconds: f64,
    /// With the files in the system's memory.
    pub(crate) warm_seconds: Runs,
    /// After the system forgot the files' contents; their names and sizes it may still have.
    pub(crate) cold_seconds: Runs,
    pub(crate) promise: Promise,
}

/// Lays objects into a directory as a store would, and starts stores on it.
pub(crate) async fn measure(data: &Path, count: usize, runs: usize) -> anyhow::Result<Start> {
    let folder = data.to_owned();
    let files = tokio::task::spawn_blocking(move || lay(&folder, count)).await??;
    let rounds = runs.clamp(1, ROUNDS);
    let bar = bar("start", 2 * rounds as u64 + 1)?;
    let first_seconds = once(data, count).await?;
    let (mut warm, mut cold) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        bar.inc(1);
        warm.push(once(data, count).await?);
        bar.inc(1);
        files.iter().try_for_each(|file| forget(file))?;
        cold.push(once(data, count).await?);
    }
    bar.finish_and_clear();
    let cold_seconds = Runs::of(cold);
    let promise = Promise::new(
        "seconds of a start with many objects, cold",
        None,
        cold_seconds.clone(),
        Wanted::AtMost(10.0),
    );
    Ok(Start { objects: count, first_seconds, warm_seconds: Runs::of(warm), cold_seconds, promise })
}

/// Writes the files; returns their paths when all of them are on the disk.
fn lay(data: &Path, count: usize) -> anyhow::Result<Vec<PathBuf>> {
    let bar = bar("objects", count as u64)?;
    let (mut files, mut folders) = (Vec::with_capacity(count), HashSet::new());
    for number in 0..count {
        let number = (3 << 48) + number as u64;
        let file = objects::file(data, &objects::key(number));
        let folder = file.parent().context("an object has a folder")?;
        if folders.insert(folder.to_owned()) {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(&file, objects::smallest(number)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        files.push(file);
        if files.len().is_multiple_of(STEP) {
            bar.inc(STEP as u64);
        }
    }
    rustix::fs::sync();
    bar.finish_and_clear();
    Ok(files)
}

/// Seconds until a store on `data` answers, with all of its objects.
async fn once(data: &Path, count: usize) -> anyhow::Result<f64> {
    let began = Instant::now();
    let node = Node::start(data, 1 << 30).await?;
    let seconds = began.elapsed().as_secs_f64();
    let stat = node.process.stat().await?;
    anyhow::ensure!(stat.objects as usize == count, "the store has {} of {count} objects", stat.objects);
    Ok(seconds)
}
