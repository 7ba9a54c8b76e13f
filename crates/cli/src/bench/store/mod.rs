//! `cacheclip bench store`: the store beside Redis, raw sockets and plain files.
//!
//! One round gives everything its turn once, so that what else the machine does falls on all of it; a ratio is taken
//! within a round, and the median over rounds is what counts. Stores are processes of their own on this machine.

mod memory;
mod nodes;
mod objects;
mod peers;
mod redis_peer;
mod report;
mod several;
mod start;
mod times;
mod transfer;

use super::bar;
use super::measure::Machine;
use anyhow::Context as _;
use clap::ValueEnum;
use nodes::Node;
use redis_peer::Redis;
use report::Report;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use transfer::Ring;

/// Bytes that the store keeps in RAM from which is read: all that it is given.
const RAM: u64 = 4 << 30;

/// Arguments of `bench store`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// MiB of the objects that are moved.
    #[arg(long, value_delimiter = ',', default_value = "4,32,128")]
    sizes: Vec<usize>,
    /// Rounds.
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// What is measured.
    #[arg(long, value_delimiter = ',', value_enum, default_value = "transfer,layers,lookup,memory,start")]
    parts: Vec<Part>,
    /// Small objects that a store finds when it starts.
    #[arg(long, default_value_t = 100_000)]
    start_objects: usize,
    /// Slow readers at the same time.
    #[arg(long, default_value_t = 64)]
    readers: usize,
    /// MiB that the store they read from may keep in RAM.
    #[arg(long, default_value_t = 1024)]
    budget_mib: u64,
    /// Folder for the stores' files, on the volume that is measured; the system's temporary one where it is not given.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The Redis to measure beside.
    #[arg(long, default_value = "redis-server")]
    redis_server: PathBuf,
    /// Draw the throughputs into this folder.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// One object, there and back.
    Transfer,
    /// The first layer of many chunks.
    Layers,
    /// Lookups of many keys.
    Lookup,
    /// Slow readers.
    Memory,
    /// A start with many objects.
    Start,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(arguments.runs > 0, "runs: at least 1");
    anyhow::ensure!(arguments.sizes.iter().all(|mib| (1..=512).contains(mib)), "sizes: 1 to 512 MiB");
    let folder = match &arguments.dir {
        Some(dir) => tempfile::tempdir_in(dir).with_context(|| format!("cannot use {}", dir.display()))?,
        None => tempfile::tempdir()?,
    };
    let mut report = Report::new(Machine::here(), arguments.runs);
    together(&arguments, folder.path(), &mut report).await?;
    let measured = |part| arguments.parts.contains(&part);
    if measured(Part::Memory) {
        let (data, budget) = (folder.path().join("memory"), arguments.budget_mib << 20);
        report.memory = Some(memory::measure(&data, arguments.readers, budget).await?);
    }
    if measured(Part::Start) {
        let data = folder.path().join("start");
        report.start = Some(start::measure(&data, arguments.start_objects, arguments.runs).await?);
    }
    if let Some(svg) = &arguments.svg {
        report.draw(svg)?;
    }
    report.tell(arguments.json)
}

/// What one store and one Redis are measured at.
async fn together(arguments: &Arguments, folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let measured = |part| arguments.parts.contains(&part);
    if ![Part::Transfer, Part::Layers, Part::Lookup].into_iter().any(measured) {
        return Ok(());
    }
    let mut redis = match Redis::start(&arguments.redis_server).await {
        Ok(redis) => Ok(redis),
        Err(error) => Err(format!("{error:#}")),
    };
    let rounds = arguments.runs as u64 + 1;
    let length = [
        (Part::Transfer, rounds * arguments.sizes.len() as u64 * transfer::TURNS),
        (Part::Layers, rounds),
        (Part::Lookup, rounds),
    ];
    let bar = bar("store", length.iter().filter(|(part, _)| measured(*part)).map(|(_, turns)| turns).sum())?;
    let memory = Node::start(&folder.join("in-memory"), RAM).await?;
    if measured(Part::Transfer) {
        // No object fits into a byte: this one reads from the disk each time.
        let disk = Node::start(&folder.join("on-disk"), 1).await?;
        let mut ring = Ring { memory: &memory, disk: &disk, redis: &mut redis, folder, bar: &bar };
        for &mib in &arguments.sizes {
            report.transfers.push(transfer::measure(&mut ring, mib, arguments.runs).await?);
        }
    }
    if measured(Part::Layers) {
        report.layers = Some(several::layers(&memory, arguments.runs, &bar).await?);
    }
    if measured(Part::Lookup) {
        report.lookup = Some(several::lookups(&memory, &mut redis, arguments.runs, &bar).await?);
    }
    bar.finish_and_clear();
    Ok(())
}
