//! The task that reads frames from a store until every chunk has come or is known not to.

use crate::chunk::Arrival;
use crate::client::{Node, pause, reason, worth_retrying};
use crate::layers::{Item, LayerStream, Pending};
use crate::{Options, metrics};
use cacheclip_chunk::{ChunkKey, LayoutId};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::v1::{GetLayersRequest, KvFrame, MissReason, kv_frame};
use cacheclip_service::request_id::{self, outgoing};
use cacheclip_service::seconds;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tonic::{Request, Status, Streaming};

/// One read of layers.
pub(crate) struct Fetch {
    pub(crate) node: Node,
    pub(crate) layout: LayoutId,
    pub(crate) keys: Vec<ChunkKey>,
    pub(crate) range: Range<u32>,
    pub(crate) options: Arc<Options>,
}

/// Starts reading; the task ends with the stream's end or with the stream.
pub(crate) fn start(fetch: Fetch) -> LayerStream {
    let (outbox, inbox) = mpsc::channel(fetch.options.decode_ahead.max(1));
    if !fetch.keys.is_empty() && !fetch.range.is_empty() {
        let reading = async move {
            let started = Instant::now();
            tokio::select! {
                () = Reader::new(fetch, outbox.clone()).run() => {}
                // Dropping the response resets its stream, and the store stops.
                () = outbox.closed() => {}
            }
            metrics::load_ended(started.elapsed().as_secs_f64());
        };
        match request_id::current() {
            Some(id) => tokio::spawn(request_id::scope(id, reading)),
            None => tokio::spawn(reading),
        };
    }
    LayerStream::new(inbox)
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

struct Reader {
    fetch: Fetch,
    arrivals: Vec<Arrival>,
    outbox: mpsc::Sender<Pending>,
    silence: Duration,
}

impl Reader {
    fn new(fetch: Fetch, outbox: mpsc::Sender<Pending>) -> Self {
        let arrivals = fetch.keys.iter().map(|key| Arrival::new(*key, fetch.range.clone())).collect();
        let silence = seconds(fetch.options.silence_seconds);
        Self { fetch, arrivals, outbox, silence }
    }

    async fn run(mut self) {
        let mut missing = MissReason::Unavailable;
        for attempt in 0..=self.fetch.options.retries {
            pause(&self.fetch.options, attempt).await;
            match self.attempt().await {
                Ended::Complete | Ended::Unwanted => return,
                // Waiting as long again helps nobody: the caller can compute the chunk meanwhile.
                Ended::Silent => {
                    missing = MissReason::Timeout;
                    break;
                }
                Ended::Broke(status) => {
                    tracing::debug!(attempt, %status, "read of layers broke off");
                    missing = reason(&status);
                    if !worth_retrying(&status) {
                        break;
                    }
                }
            }
        }
        for chunk in 0..self.arrivals.len() {
            if !self.arrivals[chunk].over && self.give_up(chunk, missing).await.is_err() {
                return;
            }
        }
    }

    /// Asks for what has not come yet and takes what comes.
    async fn attempt(&mut self) -> Ended {
        let asked: Vec<usize> =
            (0..self.arrivals.len()).filter(|&chunk| !self.arrivals[chunk].over).collect();
        if asked.is_empty() {
            return Ended::Complete;
        }
        let first_layer =
            asked.iter().map(|&chunk| self.arrivals[chunk].next_layer).min().unwrap_or_default();
        let request = GetLayersRequest {
            layout: id_bytes(self.fetch.layout.as_bytes()),
            keys: asked.iter().map(|&chunk| id_bytes(self.fetch.keys[chunk].as_bytes())).collect(),
            first_layer,
            end_layer: self.fetch.range.end,
        };
        asked.iter().for_each(|&chunk| self.arrivals[chunk].restart());
        let mut client = self.fetch.node.bulk.clone();
        let call = client.get_layers(outgoing(Request::new(request)));
        let mut frames = match tokio::time::timeout(self.silence, call).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Ended::Broke(status),
            Err(_) => return Ended::Silent,
        };
        loop {
            match self.next(&mut frames).await {
                Ok(Some(frame)) => match asked.get(frame.chunk as usize) {
                    Some(&chunk) => {
                        if self.take(chunk, frame).await.is_err() {
                            return Ended::Unwanted;
                        }
                    }
                    None => tracing::warn!(chunk = frame.chunk, "store sent a chunk that was not asked for"),
                },
                Ok(None) if asked.iter().all(|&chunk| self.arrivals[chunk].over) => return Ended::Complete,
                Ok(None) => return Ended::Broke(Status::unavailable("the store ended its answer early")),
                Err(ended) => return ended,
            }
        }
    }

    async fn next(&self, frames: &mut Streaming<KvFrame>) -> Result<Option<KvFrame>, Ended> {
        match tokio::time::timeout(self.silence, frames.message()).await {
            Ok(frame) => frame.map_err(Ended::Broke),
            Err(_) => Err(Ended::Silent),
        }
    }

    /// Takes one frame; an error means that the caller went away.
    async fn take(&mut self, chunk: usize, frame: KvFrame) -> Result<(), mpsc::error::SendError<Pending>> {
        let arrival = &mut self.arrivals[chunk];
        let tier = frame.tier();
        match frame.frame {
            _ if arrival.over => Ok(()),
            Some(kv_frame::Frame::Head(bytes)) => match arrival.head(self.fetch.layout, &bytes) {
                Ok(Some(head)) => self.outbox.send(Pending::Ready(Item::Head { chunk, head, tier })).await,
                Ok(None) => Ok(()),
                Err(MissReason::Corrupt) => self.corrupt(chunk).await,
                Err(reason) => self.give_up(chunk, reason).await,
            },
            Some(kv_frame::Frame::Segment(segment)) => {
                metrics::loaded(segment.data.len());
                match arrival.segment(segment) {
                    Ok(Some(whole)) => {
                        // A place in the queue first: that is what bounds segments being decoded.
                        let Ok(place) = self.outbox.reserve().await else { return Ok(()) };
                        place.send(Pending::decode(chunk, whole));
                        Ok(())
                    }
                    Ok(None) => Ok(()),
                    Err(_) => self.corrupt(chunk).await,
                }
            }
            Some(kv_frame::Frame::Missing(reason)) => {
                let reason = MissReason::try_from(reason).unwrap_or(MissReason::Unavailable);
                self.give_up(chunk, reason).await
            }
            // Whole containers are not what was asked for; kinds of a newer protocol are none of ours.
            Some(kv_frame::Frame::Data(_)) | None => Ok(()),
        }
    }

    async fn corrupt(&mut self, chunk: usize) -> Result<(), mpsc::error::SendError<Pending>> {
        metrics::verify_failed();
        tracing::warn!(chunk, key = %self.fetch.keys[chunk], "store sent frames that do not fit together");
        self.give_up(chunk, MissReason::Corrupt).await
    }

    async fn give_up(
        &mut self,
        chunk: usize,
        reason: MissReason,
    ) -> Result<(), mpsc::error::SendError<Pending>> {
        self.arrivals[chunk].over = true;
        self.outbox.send(Pending::Ready(Item::Missing { chunk, reason })).await
    }
}
