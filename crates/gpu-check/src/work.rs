//! What a part works with: its time, the rows it gives, and peers.

use crate::budget::Deadline;
use crate::scale::Scale;
use cacheclip_bench::peers::Peers;
use serde::Serialize;
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Where rows go.
#[derive(Clone, Debug)]
pub enum Sink {
    /// Standard output, a line each.
    Lines,
    /// Kept, for who calls a part in its own process.
    Kept(Arc<Mutex<Vec<Value>>>),
}

/// What a part is given.
#[derive(Clone, Debug)]
pub struct Work {
    /// When it must be done.
    pub deadline: Deadline,
    /// How much of everything.
    pub scale: Scale,
    /// Python with PyTorch for CUDA; none: no peer.
    pub python: Option<PathBuf>,
    /// The script that asks it.
    pub script: PathBuf,
    /// Folder with the tiny models.
    pub models: PathBuf,
    /// Where rows go.
    pub sink: Sink,
}

impl Work {
    /// Gives a row, at once: whoever cuts this process keeps it.
    ///
    /// # Errors
    /// Nobody reads any more.
    pub fn row(&self, row: &impl Serialize) -> anyhow::Result<()> {
        if let Sink::Kept(rows) = &self.sink {
            rows.lock().unwrap_or_else(PoisonError::into_inner).push(serde_json::to_value(row)?);
            return Ok(());
        }
        let line = serde_json::to_string(row)?;
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}")?;
        Ok(out.flush()?)
    }

    /// Tells people what is going on.
    pub fn say(&self, text: std::fmt::Arguments<'_>) {
        // Nobody needs to listen.
        _ = writeln!(std::io::stderr().lock(), "  {text} ({:.0} s left)", self.deadline.left());
    }

    /// Rounds of `measure`, the first of which is thrown away: as many as wanted, fewer where time runs out, but one.
    ///
    /// # Errors
    /// The first error of `measure`.
    pub fn rounds(
        &self,
        wanted: usize,
        mut measure: impl FnMut() -> anyhow::Result<()>,
        mut forget: impl FnMut(),
    ) -> anyhow::Result<()> {
        let began = Instant::now();
        measure()?;
        // Another round would last about as long.
        if self.deadline.left() < began.elapsed().as_secs_f64() {
            return Ok(());
        }
        forget();
        for _ in 0..wanted {
            let began = Instant::now();
            measure()?;
            if self.deadline.left() < began.elapsed().as_secs_f64() {
                break;
            }
        }
        Ok(())
    }

    /// The peer, if it is there; else why not.
    pub fn peer(&self) -> Result<Peer, String> {
        let python = self.python.as_deref().ok_or("no Python was named")?;
        Peer::start(python, &self.script).map_err(|error| format!("{error:#}"))
    }
}

/// PyTorch on the same GPU.
#[derive(Debug)]
pub struct Peer {
    peers: Peers,
    /// Its version, and the device's name as it says it.
    pub version: String,
}

impl Peer {
    fn start(python: &Path, script: &Path) -> anyhow::Result<Self> {
        let mut peers = Peers::start(python, script)?;
        let about = peers.ask(&json!({ "op": "describe" }))?;
        let version = about["version"].as_str().unwrap_or_default().to_owned();
        Ok(Self { peers, version })
    }

    /// The field `field` of its answer to `request`.
    ///
    /// # Errors
    /// It refused, ran out of memory or ended.
    pub fn number(&mut self, request: &Value, field: &str) -> anyhow::Result<f64> {
        let answer = self.peers.ask(request)?;
        answer[field].as_f64().ok_or_else(|| anyhow::anyhow!("{request}: no {field} in {answer}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(seconds: f64) -> Work {
        Work {
            deadline: Deadline::within(seconds),
            scale: Scale::REHEARSAL,
            python: None,
            script: PathBuf::new(),
            models: PathBuf::new(),
            sink: Sink::Lines,
        }
    }

    fn counted(seconds: f64) -> usize {
        let seen = std::cell::RefCell::new(0);
        let measure = || {
            *seen.borrow_mut() += 1;
            Ok(())
        };
        work(seconds).rounds(4, measure, || *seen.borrow_mut() = 0).expect("nothing fails");
        seen.into_inner()
    }

    #[test]
    fn the_first_round_is_thrown_away_and_one_is_kept_whatever_the_time() {
        assert_eq!(counted(60.0), 4);
        assert_eq!(counted(0.0), 1);
    }

    #[test]
    fn a_peer_that_is_not_there_is_named() {
        assert_eq!(work(1.0).peer().expect_err("none"), "no Python was named");
        let missing = Work { python: Some("/no/such/python".into()), ..work(1.0) };
        assert!(missing.peer().expect_err("none").contains("/no/such/python"));
    }
}
