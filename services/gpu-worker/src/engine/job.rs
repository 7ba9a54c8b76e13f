//! What the engine is asked to do.

use super::shadow::per_row;
use super::turns::Tenant;
use super::{Canonical, Error, Event, Generation};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// A section to encode: its canonical KV behind `behind` (empty for a prefix).
#[derive(Debug)]
pub(super) struct Section {
    pub(super) behind: Arc<[u32]>,
    pub(super) ids: Vec<u32>,
    pub(super) tenant: Tenant,
    pub(super) reply: oneshot::Sender<Result<Canonical, Error>>,
    /// Until it is done.
    pub(super) _owed: Owed,
}

/// A prompt to answer.
#[derive(Debug)]
pub(super) struct Prompt {
    pub(super) generation: Box<Generation>,
    pub(super) events: mpsc::Sender<Event>,
    /// Until it is done.
    pub(super) _owed: Owed,
}

impl Prompt {
    /// Tells the caller that nothing comes of it.
    pub(super) fn fail(self, error: Error) {
        fail(&self.events, error);
    }
}

/// Tells the reader of `events` that the answer cannot be completed.
pub(super) fn fail(events: &mpsc::Sender<Event>, error: Error) {
    // The channel has room for every event; a closed one has no reader left to tell.
    let _ = events.try_send(Event::Failed(error));
}

/// What the engine has to do, as others may see it.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Jobs taken from the channel whose answers have not begun.
    pub(super) waiting: AtomicU32,
    /// Sequences being decoded.
    pub(super) running: AtomicU32,
    /// Rows asked for and not computed yet.
    rows: AtomicU64,
    /// Seconds per row of this worker's own passes, as bits; 0 while unknown.
    seconds_per_row: AtomicU64,
}

impl Load {
    /// Counts rows as asked for until what is returned goes.
    pub(super) fn owe(self: &Arc<Self>, rows: usize) -> Owed {
        self.rows.fetch_add(rows as u64, Ordering::Relaxed);
        Owed { load: Arc::clone(self), rows: rows as u64 }
    }

    /// Rows asked for and not computed yet.
    pub(super) fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Takes a pass of the engine into account, of whatever kind. The engine's thread alone does.
    pub(super) fn saw(&self, rows: usize, took: Duration) {
        let per_row = per_row(self.seconds_per_row(), rows, took).unwrap_or_default();
        self.seconds_per_row.store(per_row.to_bits(), Ordering::Relaxed);
    }

    /// What a row costs, once one is known.
    pub(super) fn seconds_per_row(&self) -> Option<f64> {
        Some(f64::from_bits(self.seconds_per_row.load(Ordering::Relaxed))).filter(|&seconds| seconds > 0.0)
    }
}

/// Rows that are still to be computed.
#[derive(Debug)]
pub(crate) struct Owed {
    load: Arc<Load>,
    rows: u64,
}

impl Drop for Owed {
    fn drop(&mut self) {
        self.load.rows.fetch_sub(self.rows, Ordering::Relaxed);
    }
}
