//! What `bench store` prints and draws.

use super::super::draw_bars;
use super::super::measure::{Machine, Runs};
use super::memory::Memory;
use super::several::{Layers, Lookups};
use super::start::Start;
use super::times::{Promise, Row};
use super::transfer::Transfer;
use crate::text;
use anyhow::Context as _;
use cacheclip_bench::plot::Bars;
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;

/// Everything that was measured; a part that was not asked for is absent.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    pub(crate) runs: usize,
    pub(crate) transfers: Vec<Transfer>,
    pub(crate) layers: Option<Layers>,
    pub(crate) lookup: Option<Lookups>,
    pub(crate) memory: Option<Memory>,
    pub(crate) start: Option<Start>,
}

impl Report {
    pub(crate) fn new(machine: Machine, runs: usize) -> Self {
        Self { machine, runs, transfers: Vec::new(), layers: None, lookup: None, memory: None, start: None }
    }

    /// Prints it.
    pub(crate) fn tell(&self, json: bool) -> anyhow::Result<ExitCode> {
        if json {
            return text::json(self);
        }
        let (machine, runs) = (self.machine.text(), self.runs);
        text::line(format_args!("{machine}; median [least, most] of {runs} rounds"));
        let rows: Vec<_> = self.rows().map(Row::cells).collect();
        if !rows.is_empty() {
            text::table(&["", "MiB", "GB/s"], &rows);
        }
        for transfer in &self.transfers {
            text::line(transfer.stages.text());
            if !transfer.direct {
                text::line(
                    "the volume knows no direct reads: the peer read after the system forgot the file",
                );
            }
        }
        self.tell_parts();
        let promises: Vec<_> = self.promises().map(Promise::cells).collect();
        text::table(&["promise", "MiB", "measured", "wanted", ""], &promises);
        Ok(ExitCode::SUCCESS)
    }

    fn tell_parts(&self) {
        if let Some(Layers { chunks, bytes, first_ms, whole_ms, .. }) = &self.layers {
            let (first, whole, mb) = (first_ms.text(1), whole_ms.text(1), *bytes as f64 / 1e6);
            text::line(format_args!(
                "{chunks} chunks, {mb:.0} MB: layer 0 of all after {first} ms, all layers after {whole} ms"
            ));
        }
        if let Some(Lookups { keys, lookup_us, redis_us, skipped, .. }) = &self.lookup {
            let of = |runs: &Option<Runs>| runs.as_ref().map_or("-".into(), |runs| runs.text(0));
            let (ours, theirs) = (of(lookup_us), of(redis_us));
            let why = skipped.as_ref().map_or(String::new(), |why| format!(" (skipped: {why})"));
            text::line(format_args!("lookup of {keys} keys {ours} µs, Redis pipeline {theirs} µs{why}"));
        }
        if let Some(it) = &self.memory {
            let mb = |bytes: u64| bytes as f64 / 1e6;
            text::line(format_args!(
                "{} slow readers of {} MiB each: peak {:.0} MB, before {:.0} MB, budget {:.0} MB",
                it.readers,
                it.object_mib,
                mb(it.peak_bytes),
                mb(it.before_bytes),
                mb(it.budget_bytes)
            ));
        }
        if let Some(Start { objects, first_seconds, warm_seconds, cold_seconds, .. }) = &self.start {
            let (warm, cold) = (warm_seconds.text(2), cold_seconds.text(2));
            text::line(format_args!(
                "start with {objects} objects: first {first_seconds:.2} s, warm {warm} s, cold {cold} s"
            ));
        }
    }

    fn rows(&self) -> impl Iterator<Item = &Row> {
        self.transfers.iter().flat_map(|transfer| &transfer.rows)
    }

    fn promises(&self) -> impl Iterator<Item = &Promise> {
        let transfers = self.transfers.iter().flat_map(|transfer| &transfer.promises);
        transfers
            .chain(self.layers.iter().map(|it| &it.promise))
            .chain(self.lookup.iter().filter_map(|it| it.promise.as_ref()))
            .chain(self.memory.iter().map(|it| &it.promise))
            .chain(self.start.iter().map(|it| &it.promise))
    }

    /// Draws throughputs: one file of what is read from RAM, one of what is read from and written to the disk.
    pub(crate) fn draw(&self, folder: &Path) -> anyhow::Result<()> {
        if self.transfers.is_empty() {
            return Ok(());
        }
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let memory = ["get", "redis get + blake3", "receive", "receive, generated", "socket"];
        draw_bars(&self.bars("Read from RAM, verified", &memory), &folder.join("store-memory.svg"))?;
        let disk = ["get, cold", "direct read", "put", "fsynced write"];
        draw_bars(&self.bars("Read from the disk, put durably", &disk), &folder.join("store-disk.svg"))
    }

    fn bars(&self, title: &str, names: &[&str]) -> Bars {
        let group = |transfer: &Transfer| {
            let mib = transfer.rows.first().map_or(0, |row| row.mib);
            let of = |name: &&str| {
                let row = transfer.rows.iter().find(|row| row.name == *name);
                row.and_then(|row| row.bytes_per_second.as_ref()).map_or(f64::NAN, |runs| runs.median / 1e9)
            };
            (format!("{mib} MiB"), names.iter().map(of).collect())
        };
        Bars {
            title: title.into(),
            y: "GB/s (median)".into(),
            series: names.iter().map(|&name| name.to_owned()).collect(),
            groups: self.transfers.iter().map(group).collect(),
        }
    }
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let rate = match (&self.bytes_per_second, &self.skipped) {
            (Some(runs), _) => runs.map(|rate| rate / 1e9).text(2),
            (None, Some(why)) => format!("skipped: {why}"),
            (None, None) => "-".into(),
        };
        vec![self.name.to_owned(), self.mib.to_string(), rate]
    }
}
