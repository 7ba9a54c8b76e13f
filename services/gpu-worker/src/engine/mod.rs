//! The engine: one OS thread owns the model's device and everything that touches it.
//!
//! Jobs arrive over a bounded channel. Each turn of the loop starts at most one new piece of prefill work and
//! then decodes one token of every running sequence, so a long queue of prompts never starves an answer that
//! is already being written.

mod generation;
mod prefill;
mod shadow;

pub(crate) use generation::{Event, Generation, Outcome, Placed};
pub(crate) use prefill::Canonical;
pub(crate) use prefill::RANK_VERSION;

use cacheclip_model::kv::ChunkKv;
use cacheclip_model::pages::{Allocator, Sequence};
use cacheclip_model::{Cpu, Decoder, Device};
use cacheclip_prompt::Tokenizer;
use generation::Running;
use shadow::{Rate, Shadow};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::sync::{mpsc, oneshot};

/// The device this build computes on.
pub(crate) type Compute = Cpu;

/// Why the engine did not do a job.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The queue is full; retry later.
    #[error("the worker's queue is full")]
    Busy,
    /// The sequence is larger than all pages together; shorten the prompt or enlarge the budget.
    #[error("the sequence needs {wanted} pages, the worker has {total}")]
    TooLarge {
        /// Pages wanted.
        wanted: usize,
        /// Pages there are.
        total: usize,
    },
    /// The engine thread is gone; restart the worker.
    #[error("the engine has stopped")]
    Stopped,
    /// Selection was impossible as asked.
    #[error(transparent)]
    Plan(#[from] cacheclip_plan::Error),
    /// The device or the model failed.
    #[error(transparent)]
    Model(#[from] cacheclip_model::Error),
}

enum Job {
    /// Canonical KV of a section: computed behind `behind` (empty for a prefix).
    Canonical {
        behind: Arc<[u32]>,
        ids: Vec<u32>,
        reply: oneshot::Sender<Result<Canonical, Error>>,
    },
    Generate {
        generation: Box<Generation>,
        events: mpsc::Sender<Event>,
    },
}

impl Job {
    fn positions(&self) -> usize {
        match self {
            Self::Canonical { behind, ids, .. } => behind.len() + ids.len(),
            Self::Generate { generation, .. } => generation.positions(),
        }
    }

    /// Whether nobody waits for the result any more.
    fn abandoned(&self) -> bool {
        match self {
            Self::Canonical { reply, .. } => reply.is_closed(),
            Self::Generate { events, .. } => events.is_closed(),
        }
    }

    fn fail(self, error: Error) {
        match self {
            // As below: a closed channel has no reader left to tell.
            Self::Canonical { reply, .. } => drop(reply.send(Err(error))),
            Self::Generate { events, .. } => fail(&events, error),
        }
    }
}

/// Handle to the engine thread; cheap to clone. The thread ends when the last handle is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    jobs: mpsc::Sender<Job>,
    load: Arc<Load>,
}

/// What the engine has to do, as others may see it.
#[derive(Debug, Default)]
struct Load {
    /// Jobs taken from the channel that have not begun.
    waiting: AtomicU32,
    /// Sequences being decoded.
    running: AtomicU32,
}

impl Engine {
    /// Starts the thread. `pages` is the KV budget in pages, `queue` the number of jobs that may wait,
    /// `shadow_ratio` the share of greedy requests that are computed in context, too, to compare.
    ///
    /// # Errors
    /// The device cannot hold the pages, or no thread can be started.
    pub(crate) fn start(
        decoder: Decoder<Compute>,
        tokenizer: Tokenizer,
        pages: usize,
        queue: usize,
        shadow_ratio: f64,
    ) -> anyhow::Result<Self> {
        let (jobs, inbox) = mpsc::channel(queue);
        let allocator = Allocator::new(pages);
        let pages = decoder.pages(allocator.total())?;
        let load = Arc::<Load>::default();
        let state = Thread {
            load: Arc::clone(&load),
            rate: Rate::default(),
            shadow: Shadow::new(shadow_ratio),
            decoder,
            tokenizer,
            pages,
            allocator,
            waiting: VecDeque::new(),
            running: Vec::new(),
            queue,
        };
        std::thread::Builder::new().name("engine".into()).spawn(move || state.run(inbox))?;
        Ok(Self { jobs, load })
    }

    /// Requests that wait, and requests that run.
    pub(crate) fn load(&self) -> (u32, u32) {
        let queued = (self.jobs.max_capacity() - self.jobs.capacity()) as u32;
        let waiting = queued + self.load.waiting.load(Ordering::Relaxed);
        (waiting, self.load.running.load(Ordering::Relaxed))
    }

    /// Completes when the engine thread is gone.
    pub(crate) async fn stopped(&self) {
        self.jobs.closed().await;
    }

    /// Canonical KV of `ids` behind the anchor `behind`, anchor stripped.
    ///
    /// # Errors
    /// The engine stopped or the model failed.
    pub(crate) async fn canonical(&self, behind: Arc<[u32]>, ids: Vec<u32>) -> Result<Canonical, Error> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(Job::Canonical { behind, ids, reply }).await.map_err(|_| Error::Stopped)?;
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// Queues a generation; its events end with [`Event::Done`] or [`Event::Failed`].
    ///
    /// # Errors
    /// The queue is full or the engine stopped.
    pub(crate) fn generate(&self, generation: Generation) -> Result<mpsc::Receiver<Event>, Error> {
        // Room for every event there can be: the engine never waits for a slow reader.
        let (events, receiver) = mpsc::channel(generation.max_tokens + 2);
        let job = Job::Generate { generation: Box::new(generation), events };
        match self.jobs.try_send(job) {
            Ok(()) => Ok(receiver),
            Err(mpsc::error::TrySendError::Full(_)) => Err(Error::Busy),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Error::Stopped),
        }
    }
}

/// What the engine thread owns.
struct Thread {
    decoder: Decoder<Compute>,
    tokenizer: Tokenizer,
    pages: <Compute as Device>::Pages,
    allocator: Allocator,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
    queue: usize,
    load: Arc<Load>,
    rate: Rate,
    shadow: Shadow,
}

impl Thread {
    fn run(mut self, mut inbox: mpsc::Receiver<Job>) {
        loop {
            let idle = self.running.is_empty() && self.waiting.is_empty();
            let job = if idle {
                match inbox.blocking_recv() {
                    Some(job) => Some(job),
                    None => return,
                }
            } else if self.waiting.len() < self.queue {
                inbox.try_recv().ok()
            } else {
                None
            };
            self.waiting.extend(job);
            self.admit();
            self.decode();
            self.load.waiting.store(self.waiting.len() as u32, Ordering::Relaxed);
            self.load.running.store(self.running.len() as u32, Ordering::Relaxed);
            crate::metrics::requests(inbox.len() + self.waiting.len(), self.running.len());
            crate::metrics::pages(self.allocator.total() - self.allocator.free(), self.allocator.total());
        }
    }

    /// Does the first waiting job, if there are pages for it; running sequences that hold them are waited for,
    /// in order.
    fn admit(&mut self) {
        let Some(job) = self.waiting.pop_front() else { return };
        if job.abandoned() {
            return;
        }
        match self.allocator.sequence(job.positions()) {
            Ok(sequence) => self.begin(job, sequence),
            Err(cacheclip_model::Error::OutOfPages { wanted, total, .. }) if wanted > total => {
                job.fail(Error::TooLarge { wanted, total });
            }
            Err(_) => self.waiting.push_front(job),
        }
    }

    fn begin(&mut self, job: Job, sequence: Sequence) {
        match job {
            Job::Canonical { behind, ids, reply } => {
                // A caller that went away does not want the answer.
                let _ = reply.send(self.canonical(&behind, &ids, &sequence));
            }
            Job::Generate { generation, events } => {
                let shadowed = self.shadow.turn(&generation);
                match self.prefill(&generation, sequence) {
                    Ok(first) => {
                        let token = first.token;
                        self.running.extend(Running::start(*generation, first, events, &self.tokenizer));
                        if let Some(ids) = shadowed {
                            self.compare(&ids, token);
                        }
                    }
                    Err(error) => fail(&events, error),
                }
            }
        }
    }

    /// One token for every running sequence.
    fn decode(&mut self) {
        let (decoder, pages) = (&self.decoder, &mut self.pages);
        self.running.retain_mut(|running| running.step(decoder, pages));
    }
}

fn fail(events: &mpsc::Sender<Event>, error: Error) {
    // The channel has room for every event; a closed one has no reader left to tell.
    let _ = events.try_send(Event::Failed(error));
}

/// Bytes a chunk's KV takes in memory.
pub(crate) fn weight(kv: &ChunkKv) -> u64 {
    kv.bytes() as u64
}
