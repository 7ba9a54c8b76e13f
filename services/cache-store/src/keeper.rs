//! Keeps the index up to date in the background: the lease, what came and went, and everything again where the
//! index has lost it. Nobody waits for it.

use crate::catalogue::Catalogue;
use crate::fleet::Fleet;
use crate::index::{Again, Entry, Renewal, Unavailable};
use crate::metrics;
use cacheclip_chunk::ChunkKey;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// Chunks announced at once.
const BATCH: usize = 256;
/// Pause between batches of a full announcement: some 2500 chunks a second per store, so that a fleet that comes
/// back all at once does not drown the index.
const PACE: Duration = Duration::from_millis(100);
/// First wait after a failure; it doubles up to the time between renewals.
const BACKOFF: Duration = Duration::from_millis(100);
/// Longest time a closing store goes on announcing.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a keeper works on.
pub(crate) struct Keeper {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) catalogue: Arc<Mutex<Catalogue>>,
    /// Time between renewals of the lease.
    pub(crate) every: Duration,
    /// Shows whether something is wrong with the index, in words; empty when nothing is.
    pub(crate) report: Box<dyn Fn(&str) + Send + Sync>,
    /// Cancelled when a drain begins.
    pub(crate) draining: CancellationToken,
    /// Cancelled when the store is closed.
    pub(crate) closed: CancellationToken,
}

impl Keeper {
    /// Runs until the store is closed. `contact` is told when the index has been asked once, well or not.
    pub(crate) async fn run(self, contact: oneshot::Sender<()>) {
        (self.report)("index: it has not been asked yet");
        metrics::index_up(false);
        let now = Instant::now();
        let keeping = Keeping {
            keeper: self,
            contact: Some(contact),
            state: State::Unknown,
            failures: 0,
            reported: String::new(),
            renew_at: now,
            batch_at: now,
            remaining: Vec::new(),
            lost: false,
            left: false,
        };
        keeping.run().await;
    }
}

/// What the index was when it was last asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unknown,
    Up,
    Down,
}

enum Step {
    Close,
    Leave,
    Renew,
    Announce,
}

struct Keeping {
    keeper: Keeper,
    contact: Option<oneshot::Sender<()>>,
    state: State,
    failures: u32,
    reported: String,
    renew_at: Instant,
    batch_at: Instant,
    /// What a full announcement has still to do.
    remaining: Vec<ChunkKey>,
    /// The full announcement is one because the index may have lost everything.
    lost: bool,
    left: bool,
}

impl Keeping {
    async fn run(mut self) {
        let (draining, closed) = (self.keeper.draining.clone(), self.keeper.closed.clone());
        loop {
            let step = tokio::select! {
                biased;
                () = closed.cancelled() => Step::Close,
                () = draining.cancelled(), if !self.left => Step::Leave,
                () = sleep_until(self.renew_at), if !self.left => Step::Renew,
                step = self.work(), if self.state == State::Up => step,
            };
            match step {
                Step::Close => break,
                Step::Leave => self.leave().await,
                // Connecting may take a while, and a drain need not wait for it.
                Step::Renew => tokio::select! {
                    biased;
                    () = draining.cancelled() => {}
                    () = closed.cancelled() => {}
                    () = self.renew() => {}
                },
                Step::Announce => self.announce().await,
            }
        }
        if !self.left {
            self.leave().await;
        }
        let deadline = Instant::now() + LAST_WORDS;
        while self.state == State::Up && self.waits() && Instant::now() < deadline {
            self.announce().await;
        }
    }

    /// Changes wait to be announced.
    fn waits(&self) -> bool {
        let waiting = self.keeper.fleet.changes.waiting();
        waiting.came + waiting.went > 0 || waiting.overflowed
    }

    /// Waits for something to do while the index is up.
    async fn work(&self) -> Step {
        let changes = &self.keeper.fleet.changes;
        loop {
            if changes.take_doubt() && !self.left {
                return Step::Renew;
            }
            if self.waits() {
                return Step::Announce;
            }
            tokio::select! {
                () = changes.woken() => {}
                () = sleep_until(self.batch_at), if !self.remaining.is_empty() => return Step::Announce,
            }
        }
    }

    async fn renew(&mut self) {
        let fleet = Arc::clone(&self.keeper.fleet);
        let renewal = match fleet.index.renew(fleet.endpoint()).await {
            Ok(renewal) => renewal,
            Err(why) => return self.failed(metrics::LEASE, &why),
        };
        let Renewal { peers, again, twin } = renewal;
        fleet.hear(peers);
        self.renew_at = Instant::now() + self.keeper.every;
        let outage = self.state == State::Down;
        match again {
            Again::Lost => {
                metrics::index_error(metrics::EPOCH);
                tracing::warn!("the index has lost its records: announcing everything again");
                self.begin(true);
            }
            Again::New => self.begin(true),
            // A failover may have lost what was announced last.
            _ if outage => self.begin(true),
            Again::Refresh if self.remaining.is_empty() => self.begin(false),
            Again::Refresh | Again::No => {}
        }
        if outage {
            tracing::info!("the index answers again");
        } else {
            // One answer after an outage is no sign of health yet.
            self.failures = 0;
        }
        self.state = State::Up;
        metrics::index_up(true);
        let words = twin.map_or_else(String::new, |endpoint| {
            format!("index: another store uses this one's name ({endpoint}); give each its own `node`")
        });
        if !words.is_empty() && words != self.reported {
            tracing::warn!("{words}");
        }
        self.report(words);
        self.gauge();
        self.contacted();
    }

    /// Starts a full announcement.
    fn begin(&mut self, lost: bool) {
        self.remaining = self.keeper.catalogue.lock().records().map(|(key, _)| key).collect();
        self.lost = lost;
    }

    /// Announces one batch: changes first, then what a full announcement has still to do.
    async fn announce(&mut self) {
        let fleet = Arc::clone(&self.keeper.fleet);
        if fleet.changes.take_overflow() {
            tracing::warn!("too many changes for the index: announcing everything again");
            if let Err(why) = fleet.index.clear().await {
                // Not to be forgotten: without it, chunks that went would stay in the index.
                fleet.changes.overflow();
                return self.failed(metrics::WITHDRAW, &why);
            }
            self.begin(true);
            // Tells the others at once that older records count for nothing.
            self.renew_at = Instant::now();
            return self.gauge();
        }
        let taken = fleet.changes.take(BATCH);
        let keys: Vec<ChunkKey> = if taken.is_empty() {
            self.batch_at = Instant::now() + PACE;
            self.remaining.split_off(self.remaining.len().saturating_sub(BATCH))
        } else {
            taken.iter().map(|(key, _)| *key).collect()
        };
        match self.tell(&keys).await {
            Ok(()) => self.failures = 0,
            Err((op, why)) => {
                if taken.is_empty() {
                    self.remaining.extend(keys);
                }
                fleet.changes.put_back(taken);
                self.failed(op, &why);
            }
        }
        self.gauge();
    }

    /// Tells the index what the catalogue says now of these keys.
    async fn tell(&self, keys: &[ChunkKey]) -> Result<(), (&'static str, Unavailable)> {
        let (mut publish, mut withdraw) = (Vec::new(), Vec::new());
        {
            let catalogue = self.keeper.catalogue.lock();
            for key in keys {
                match catalogue.record(key) {
                    Some(record) => publish.push((*key, Entry::from(&record))),
                    None => withdraw.push(*key),
                }
            }
        }
        let index = &self.keeper.fleet.index;
        if !publish.is_empty() {
            index.publish(&publish).await.map_err(|why| (metrics::PUBLISH, why))?;
        }
        if !withdraw.is_empty() {
            index.withdraw(&withdraw).await.map_err(|why| (metrics::WITHDRAW, why))?;
        }
        Ok(())
    }

    async fn leave(&mut self) {
        self.left = true;
        self.keeper.fleet.drain();
        if self.state == State::Up
            && let Err(why) = self.keeper.fleet.index.leave().await
        {
            metrics::index_error(metrics::LEASE);
            tracing::info!(%why, "the lease was not withdrawn: it runs out");
        }
    }

    fn failed(&mut self, op: &'static str, why: &Unavailable) {
        metrics::index_error(op);
        metrics::index_up(false);
        if self.state != State::Down {
            tracing::warn!(%why, op, "the index does not work: going on without it");
        }
        self.state = State::Down;
        let wait = BACKOFF * 2u32.pow(self.failures.min(10));
        self.failures += 1;
        // Some luck keeps a fleet's stores from knocking all at once.
        let luck = 0.75 + f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 512.0;
        self.renew_at = Instant::now() + wait.min(self.keeper.every).mul_f64(luck);
        self.keeper.fleet.hear_nothing(why);
        self.report(why.to_string());
        self.gauge();
        self.contacted();
    }

    fn report(&mut self, words: String) {
        // The first report replaces "not asked yet" even where there is nothing to say.
        if words != self.reported || self.contact.is_some() {
            (self.keeper.report)(&words);
            self.reported = words;
        }
    }

    fn contacted(&mut self) {
        if let Some(contact) = self.contact.take() {
            // A start that stopped waiting does not mind.
            let _ = contact.send(());
        }
    }

    fn gauge(&self) {
        let waiting = self.keeper.fleet.changes.waiting();
        let unsure = if waiting.overflowed {
            self.keeper.catalogue.lock().records_len()
        } else if self.lost {
            self.remaining.len()
        } else {
            0
        };
        metrics::drift(waiting.came + unsure, waiting.went);
    }
}

#[cfg(test)]
mod tests;
