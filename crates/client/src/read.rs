//! Reads frames from one store until each of its chunks has come or is known not to.

use crate::calls::{may_be_elsewhere, pause, reason, worth_retrying};
use crate::chunk::Arrival;
use crate::fetch::final_reason;
use crate::fleet::Fleet;
use crate::layers::{Item, Pending};
use crate::node::{MAX_MESSAGE, Node};
use crate::since::Since;
use crate::{Options, metrics};
use cacheclip_chunk::{ChunkKey, LayoutId};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::stream::{self, Frames};
use cacheclip_rpc::v1::{GetLayersRequest, KvFrame, MissReason, Segment, Tier, kv_frame};
use cacheclip_service::request_id::outgoing;
use cacheclip_service::seconds;
use std::ops::Range;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Status};

/// Where to read, and what.
pub(crate) struct Source<'a> {
    pub(crate) fleet: &'a Fleet,
    pub(crate) node: &'a Node,
    pub(crate) layout: LayoutId,
    /// Keys of the whole read.
    pub(crate) keys: &'a [ChunkKey],
    pub(crate) range: Range<u32>,
    pub(crate) options: &'a Options,
    /// Hears what the store says of its deletions.
    pub(crate) since: &'a Since,
}

/// A chunk that the store does not have, although it answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Absent {
    /// Index in the keys of the whole read.
    pub(crate) chunk: usize,
    pub(crate) reason: MissReason,
}

/// A chunk of which all layers came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Complete {
    /// Index in the keys of the whole read.
    pub(crate) chunk: usize,
    /// Bytes of its container.
    pub(crate) bytes: u64,
    pub(crate) tier: Tier,
}

/// Why an attempt ended.
enum Ended {
    /// Every chunk came or is missing.
    Complete,
    /// The caller went away.
    Unwanted,
    Silent,
    Broke(Status),
}

/// The caller went away.
struct Gone;

impl From<mpsc::error::SendError<Pending>> for Gone {
    fn from(_: mpsc::error::SendError<Pending>) -> Self {
        Self
    }
}

struct Reading {
    /// Index in the keys of the whole read.
    chunk: usize,
    arrival: Arrival,
    tier: Tier,
    /// Why the store that keeps the chunk did not have it; None where this is that store.
    before: Option<MissReason>,
}

/// The read at one store, over its attempts.
pub(crate) struct Reader<'a> {
    source: Source<'a>,
    outbox: &'a mpsc::Sender<Pending>,
    readings: Vec<Reading>,
    /// Who waits to hear, once, which chunks the store does not have.
    told: Option<oneshot::Sender<Vec<Absent>>>,
    absent: Vec<Absent>,
    /// Chunks of which the store has shown neither the head nor that they are missing.
    unopened: usize,
    silence: Duration,
    started: Instant,
}

impl<'a> Reader<'a> {
    /// A read of these chunks: index, and why the store that keeps it did not have it.
    pub(crate) fn new(
        source: Source<'a>,
        wanted: impl Iterator<Item = (usize, Option<MissReason>)>,
        outbox: &'a mpsc::Sender<Pending>,
    ) -> Self {
        let reading = |(chunk, before): (usize, _)| Reading {
            chunk,
            arrival: Arrival::new(source.keys[chunk], source.range.clone()),
            tier: Tier::Unspecified,
            before,
        };
        let readings: Vec<Reading> = wanted.map(reading).collect();
        let silence = seconds(source.options.silence_seconds);
        let (unopened, started) = (readings.len(), Instant::now());
        Self { source, outbox, readings, told: None, absent: Vec::new(), unopened, silence, started }
    }

    /// Chunks that the store does not have are not given up here: `told` hears of them as soon as the store has
    /// said what it has.
    #[must_use]
    pub(crate) fn telling(self, told: oneshot::Sender<Vec<Absent>>) -> Self {
        Self { told: Some(told), ..self }
    }

    /// Reads; returns which chunks came.
    pub(crate) async fn run(mut self) -> Vec<Complete> {
        let missing = self.attempts().await;
        self.tell();
        for at in 0..self.readings.len() {
            if let Some(reason) = missing
                && !self.readings[at].arrival.over
                && self.give_up(at, reason).await.is_err()
            {
                break;
            }
        }
        let complete = self.readings.iter().filter(|it| it.arrival.complete());
        complete
            .map(|it| Complete {
                chunk: it.chunk,
                bytes: it.arrival.container_len().unwrap_or_default(),
                tier: it.tier,
            })
            .collect()
    }

    /// Tries until there is nothing more to come; returns why the rest does not come, if there is a rest.
    async fn attempts(&mut self) -> Option<MissReason> {
        let mut missing = MissReason::Unavailable;
        for attempt in 0..=self.source.options.retries {
            pause(self.source.options, attempt).await;
            match self.attempt().await {
                Ended::Complete | Ended::Unwanted => return None,
                // Waiting as long again helps nobody: the caller can compute the chunk meanwhile.
                Ended::Silent => {
                    self.source.fleet.overdue(self.source.node);
                    return Some(MissReason::Timeout);
                }
                Ended::Broke(status) => {
                    tracing::debug!(store = self.source.node.name(), attempt, %status, "read of layers broke off");
                    self.source.fleet.judge(self.source.node, &status);
                    missing = reason(&status);
                    if !worth_retrying(&status) {
                        break;
                    }
                }
            }
        }
        Some(missing)
    }

    /// Asks for what has not come yet and takes what comes.
    async fn attempt(&mut self) -> Ended {
        let asked: Vec<usize> =
            (0..self.readings.len()).filter(|&at| !self.readings[at].arrival.over).collect();
        if asked.is_empty() {
            return Ended::Complete;
        }
        let first_layer = asked.iter().map(|&at| self.readings[at].arrival.next_layer).min();
        let key = |&at: &usize| id_bytes(self.source.keys[self.readings[at].chunk].as_bytes());
        let request = GetLayersRequest {
            layout: id_bytes(self.source.layout.as_bytes()),
            keys: asked.iter().map(key).collect(),
            first_layer: first_layer.unwrap_or_default(),
            end_layer: self.source.range.end,
        };
        asked.iter().for_each(|&at| self.readings[at].arrival.restart());
        let channel = self.source.node.bulk.clone();
        let call = stream::get_layers(channel, outgoing(Request::new(request)), MAX_MESSAGE);
        let mut frames = match self.wait(call).await {
            Ok(answer) => answer.into_inner(),
            Err(ended) => return ended,
        };
        loop {
            match self.next(&mut frames).await {
                Ok(Some(frame)) => match asked.get(frame.chunk as usize) {
                    Some(&at) => {
                        if self.take(at, frame).await.is_err() {
                            return Ended::Unwanted;
                        }
                    }
                    None => tracing::warn!(chunk = frame.chunk, "store sent a chunk that was not asked for"),
                },
                Ok(None) if asked.iter().all(|&at| self.readings[at].arrival.over) => return Ended::Complete,
                Ok(None) => return Ended::Broke(Status::aborted("the store ended its answer early")),
                Err(ended) => return ended,
            }
        }
    }

    async fn next(&self, frames: &mut Frames) -> Result<Option<KvFrame>, Ended> {
        self.wait(frames.message()).await
    }

    /// Waits for the store, but not longer than it may be silent, nor for one that is known to be gone.
    async fn wait<T>(&self, what: impl Future<Output = Result<T, Status>>) -> Result<T, Ended> {
        tokio::select! {
            came = tokio::time::timeout(self.silence, what) => match came {
                Ok(came) => came.map_err(Ended::Broke),
                Err(_) => Err(Ended::Silent),
            },
            () = self.source.node.silent() => Err(Ended::Silent),
        }
    }

    async fn take(&mut self, at: usize, frame: KvFrame) -> Result<(), Gone> {
        let tier = frame.tier();
        self.source.since.told(self.source.node, frame.generation);
        if self.readings[at].arrival.over {
            return Ok(());
        }
        match frame.frame {
            Some(kv_frame::Frame::Head(bytes)) => self.head(at, &bytes, tier).await,
            Some(kv_frame::Frame::Segment(segment)) => self.segment(at, segment).await,
            Some(kv_frame::Frame::Missing(reason)) => {
                let reason = MissReason::try_from(reason).unwrap_or(MissReason::Unavailable);
                self.give_up(at, reason).await
            }
            // Whole containers are not what was asked for; kinds of a newer protocol are none of ours.
            Some(kv_frame::Frame::Data(_)) | None => Ok(()),
        }
    }

    async fn head(&mut self, at: usize, bytes: &[u8], tier: Tier) -> Result<(), Gone> {
        let reading = &mut self.readings[at];
        match reading.arrival.head(self.source.layout, bytes) {
            Ok(Some(head)) => {
                reading.tier = tier;
                let item = Item::Head { chunk: reading.chunk, head, tier };
                self.opened();
                Ok(self.outbox.send(Pending::Ready(item)).await?)
            }
            Ok(None) => Ok(()),
            Err(MissReason::Corrupt) => self.corrupt(at).await,
            Err(reason) => self.give_up(at, reason).await,
        }
    }

    async fn segment(&mut self, at: usize, segment: Segment) -> Result<(), Gone> {
        let reading = &mut self.readings[at];
        metrics::loaded(reading.tier, segment.data.len());
        match reading.arrival.segment(segment) {
            Ok(Some(whole)) => {
                if reading.arrival.over {
                    metrics::load_ended(reading.tier, self.started.elapsed().as_secs_f64());
                    self.source.node.sound();
                }
                // A place in the queue first: that is what bounds segments being decoded.
                let Ok(place) = self.outbox.reserve().await else { return Err(Gone) };
                place.send(Pending::decode(reading.chunk, whole));
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(_) => self.corrupt(at).await,
        }
    }

    async fn corrupt(&mut self, at: usize) -> Result<(), Gone> {
        metrics::verify_failed();
        let key = self.source.keys[self.readings[at].chunk];
        let store = self.source.node.name();
        tracing::warn!(%key, store, "store sent frames that do not fit together");
        self.give_up(at, MissReason::Corrupt).await
    }

    async fn give_up(&mut self, at: usize, reason: MissReason) -> Result<(), Gone> {
        let reading = &mut self.readings[at];
        reading.arrival.over = true;
        let (chunk, reason) = (reading.chunk, final_reason(reason, reading.before));
        if reading.arrival.container_len().is_none() {
            let searched = self.told.is_some() && may_be_elsewhere(reason);
            if searched {
                self.absent.push(Absent { chunk, reason });
            }
            self.opened();
            if searched {
                return Ok(());
            }
        }
        if reason == MissReason::Timeout {
            metrics::overdue(1);
        }
        Ok(self.outbox.send(Pending::Ready(Item::Missing { chunk, reason })).await?)
    }

    /// The store has said of one more chunk whether it has it.
    fn opened(&mut self) {
        self.unopened = self.unopened.saturating_sub(1);
        if self.unopened == 0 {
            self.tell();
        }
    }

    fn tell(&mut self) {
        if let Some(told) = self.told.take() {
            // Whoever waited for it may be gone with the caller.
            let _ = told.send(std::mem::take(&mut self.absent));
        }
    }
}
