//! The engine: one OS thread owns the model's device and everything that touches it.
//!
//! ```text
//! prompts ──► waiting ──pages──► prefills ──first token──► running
//! sections ─► encoder (canonical KV, pages of its own)
//! ```
//!
//! Prefill is done in steps of one block of rows through one layer ([`cacheclip_model::walk`]). Between decoding steps
//! there are only so many, and tenants take turns at them: a long prompt or many of them stall neither running answers
//! nor other tenants' prompts. Who goes away frees pages within a step.

mod encode;
mod generation;
mod job;
mod prefill;
mod shadow;
mod thread;
mod turns;

pub(crate) use encode::{Canonical, RANK_VERSION};
pub(crate) use generation::{Event, Generation, Outcome, Placed};
pub(crate) use turns::Tenant;

use cacheclip_model::kv::ChunkKv;
use cacheclip_model::{Decoder, Device};
use cacheclip_prompt::Tokenizer;
pub(crate) use job::Owed;
use job::{Load, Prompt, Section};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use thread::{Inbox, Thread};
use tokio::sync::{mpsc, oneshot};

/// Why the engine did not do a job.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The queue is full; retry later.
    #[error("the worker's queue is full")]
    Busy,
    /// The sequence is larger than all pages together; shorten the prompt or enlarge the budget.
    #[error(
        "the sequence needs {wanted} pages of KV, the worker has {total}: shorten the prompt or the answer, or raise page_bytes"
    )]
    TooLarge {
        /// Pages wanted.
        wanted: usize,
        /// Pages there are.
        total: usize,
    },
    /// The engine thread is gone; restart the worker.
    #[error("the engine has stopped")]
    Stopped,
    /// No store has recorded which document the chunks belong to; send them again.
    #[error("the stores cannot record the document's claim on its chunks: {0}; send it again")]
    Unclaimed(String),
    /// Selection was impossible as asked.
    #[error(transparent)]
    Plan(#[from] cacheclip_plan::Error),
    /// The device or the model failed.
    #[error(transparent)]
    Model(#[from] cacheclip_model::Error),
}

/// What an engine can be told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// KV budget in pages.
    pub(crate) pages: usize,
    /// Tokens of the longest section that is encoded, what stands before it included.
    pub(crate) longest: usize,
    /// Prompts that may wait, and sections.
    pub(crate) queue: usize,
    /// Rows of prefill, through all layers, between two decoding steps.
    pub(crate) prefill_rows: usize,
    /// Share of greedy requests that are computed in context, too, to compare.
    pub(crate) shadow_ratio: f64,
}

/// Handle to the engine thread; cheap to clone. The thread ends when the last handle is dropped and the work is done.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    // Before the alarm: it rings when the last sender is gone.
    prompts: mpsc::Sender<Prompt>,
    /// Apart: a prompt that has its pages may wait for them, and must not wait for prompts that have none.
    sections: mpsc::Sender<Section>,
    alarm: Arc<Alarm>,
    load: Arc<Load>,
}

/// Wakes the engine thread, at last when it goes.
#[derive(Debug)]
struct Alarm(std::thread::Thread);

impl Alarm {
    fn ring(&self) {
        self.0.unpark();
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.ring();
    }
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// The device cannot hold the pages, or no thread can be started.
    pub(crate) fn start<D: Device>(
        decoder: Decoder<D>,
        tokenizer: Tokenizer,
        options: Options,
    ) -> anyhow::Result<Self> {
        let (prompts, asked) = mpsc::channel(options.queue);
        let (sections, encode) = mpsc::channel(options.queue);
        let load = Arc::<Load>::default();
        let inbox = Inbox { prompts: asked, sections: encode };
        let state = Thread::new(decoder, tokenizer, &options, inbox, Arc::clone(&load))?;
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || state.run())?;
        Ok(Self { prompts, sections, alarm: Arc::new(Alarm(thread.thread().clone())), load })
    }

    /// A layer that a prompt may wait for has come.
    pub(crate) fn wake(&self) {
        self.alarm.ring();
    }

    /// Seconds until the engine has computed what it was asked for, and seconds per further row; `None` while it
    /// does not know its own speed.
    pub(crate) fn backlog(&self) -> Option<(f64, f64)> {
        let per_row = self.load.seconds_per_row()?;
        Some((per_row * self.load.rows() as f64, per_row))
    }

    /// Says that so many rows will be asked for, until what is returned goes.
    pub(crate) fn owe(&self, rows: usize) -> Owed {
        self.load.owe(rows)
    }

    /// Requests that wait, and requests that run.
    pub(crate) fn load(&self) -> (u32, u32) {
        let prompts = self.prompts.max_capacity() - self.prompts.capacity();
        let sections = self.sections.max_capacity() - self.sections.capacity();
        let waiting = (prompts + sections) as u32 + self.load.waiting.load(Ordering::Relaxed);
        (waiting, self.load.running.load(Ordering::Relaxed))
    }

    /// Completes when the engine thread is gone.
    pub(crate) async fn stopped(&self) {
        self.prompts.closed().await;
    }

    /// Canonical KV of `ids` behind the anchor `behind`, anchor stripped.
    ///
    /// # Errors
    /// The engine stopped or the model failed.
    pub(crate) async fn canonical(
        &self,
        behind: Arc<[u32]>,
        ids: Vec<u32>,
        tenant: Tenant,
        owed: Owed,
    ) -> Result<Canonical, Error> {
        let (reply, answer) = oneshot::channel();
        let section = Section { behind, ids, tenant, reply, _owed: owed };
        self.sections.send(section).await.map_err(|_| Error::Stopped)?;
        self.alarm.ring();
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// Queues a generation; its events end with [`Event::Done`] or [`Event::Failed`].
    ///
    /// # Errors
    /// The queue is full or the engine stopped.
    pub(crate) fn generate(&self, generation: Generation, owed: Owed) -> Result<Events, Error> {
        // Room for every event there can be: the engine never waits for a slow reader.
        let (events, inbox) = mpsc::channel(generation.max_tokens + 2);
        let prompt = Prompt { generation: Box::new(generation), events, _owed: owed };
        match self.prompts.try_send(prompt) {
            Ok(()) => {
                self.alarm.ring();
                Ok(Events { inbox, alarm: Arc::clone(&self.alarm) })
            }
            Err(mpsc::error::TrySendError::Full(_)) => Err(Error::Busy),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Error::Stopped),
        }
    }
}

/// What comes of a generation. Dropping it tells the engine to stop.
#[derive(Debug)]
pub(crate) struct Events {
    inbox: mpsc::Receiver<Event>,
    alarm: Arc<Alarm>,
}

impl Events {
    /// The next event; `None` behind the last.
    pub(crate) async fn recv(&mut self) -> Option<Event> {
        self.inbox.recv().await
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.inbox.close();
        self.alarm.ring();
    }
}

/// Bytes a chunk's KV takes in memory.
pub(crate) fn weight(kv: &ChunkKv) -> u64 {
    kv.bytes() as u64
}

#[cfg(test)]
mod tests;
