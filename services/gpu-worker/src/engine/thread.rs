//! The loop of the engine thread: take jobs, admit prompts to pages, prefill for a while, decode one token of every
//! running sequence.

use super::encode::Encoder;
use super::generation::Running;
use super::job::{Load, Prompt, Section};
use super::prefill::{Prefill, Ready};
use super::shadow::{Rate, Shadow};
use super::turns::Turns;
use super::{Error, Options};
use cacheclip_model::pages::{Allocator, page_bytes, pages_for};
use cacheclip_model::{Batch, Decoder, Device};
use cacheclip_prompt::Tokenizer;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::mpsc;

/// Sequences that are decoded in one step: weights are read once for all of them.
const BATCH: usize = 32;

/// Fewest rows of a block: smaller ones are bound by reading the weights.
const FEWEST: usize = 64;

/// What the engine is asked to do.
pub(super) struct Inbox {
    pub(super) prompts: mpsc::Receiver<Prompt>,
    pub(super) sections: mpsc::Receiver<Section>,
}

/// What the engine thread owns.
pub(super) struct Thread<D: Device> {
    decoder: Decoder<D>,
    tokenizer: Tokenizer,
    pages: D::Pages,
    allocator: Allocator,
    inbox: Inbox,
    /// Prompts without pages, in order of arrival.
    waiting: VecDeque<Prompt>,
    encoder: Encoder<D>,
    prefills: Vec<Prefill<D>>,
    running: Vec<Running>,
    turns: Turns,
    /// Of one decoding step.
    logits: Vec<f32>,
    /// Rows times layers of prefill between two decoding steps.
    budget: usize,
    /// Rows of a block.
    block_rows: usize,
    queue: usize,
    /// Pages that sequences held at a time, at most so far.
    most_pages: usize,
    load: Arc<Load>,
    /// Of passes in context: what reuse is compared with.
    rate: Rate,
    shadow: Shadow,
}

/// Whose work is next.
enum Next {
    Section,
    Prompt(usize),
}

impl<D: Device> Thread<D> {
    pub(super) fn new(
        decoder: Decoder<D>,
        tokenizer: Tokenizer,
        options: &Options,
        inbox: Inbox,
        load: Arc<Load>,
    ) -> Result<Self, Error> {
        let allocator = Allocator::new(options.pages);
        let budget = options.prefill_rows.max(1) * decoder.config().layers;
        let block_rows = budget.clamp(FEWEST, decoder.device().block_rows().max(FEWEST));
        Ok(Self {
            pages: decoder.pages(allocator.total())?,
            encoder: Encoder::new(&decoder, block_rows, options.longest)?,
            budget,
            block_rows,
            decoder,
            tokenizer,
            allocator,
            inbox,
            waiting: VecDeque::new(),
            prefills: Vec::new(),
            running: Vec::new(),
            turns: Turns::default(),
            logits: Vec::new(),
            queue: options.queue,
            most_pages: 0,
            load,
            rate: Rate::default(),
            shadow: Shadow::new(options.shadow_ratio),
        })
    }

    /// Works until nobody can ask for anything any more and everything asked for is done, or until the device is lost.
    pub(super) fn run(mut self) {
        while self.receive() {
            if self.decoder.device().lost() {
                tracing::error!("the device is lost: restart the worker");
                return;
            }
            self.prefills.retain(|prefill| !prefill.abandoned());
            self.running.retain(|running| !running.abandoned());
            self.admit();
            self.most_pages = self.most_pages.max(self.allocator.total() - self.allocator.free());
            let prefilled = self.prefill();
            let decoded = self.decode();
            self.report();
            if !prefilled && !decoded {
                // Whoever sends a job or a layer unparks; one that came just now makes this return at once.
                std::thread::park();
            }
        }
    }

    /// Takes the jobs that have come; false when there will be none and nothing is left to do.
    fn receive(&mut self) -> bool {
        while self.encoder.len() < self.queue
            && let Ok(section) = self.inbox.sections.try_recv()
        {
            self.encoder.push(section);
        }
        while self.waiting.len() < self.queue {
            match self.inbox.prompts.try_recv() {
                Ok(prompt) => self.waiting.push_back(prompt),
                Err(mpsc::error::TryRecvError::Empty) => break,
                // Both channels' senders go together.
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    let idle = self.waiting.is_empty() && self.prefills.is_empty() && self.running.is_empty();
                    return !(idle && self.encoder.len() == 0 && self.inbox.sections.is_empty());
                }
            }
        }
        true
    }

    /// Gives pages to waiting prompts in turn; one that does not fit yet keeps those behind it waiting, too, so that
    /// long prompts get their pages some time.
    fn admit(&mut self) {
        self.waiting.retain(|prompt| !prompt.events.is_closed());
        let total = self.allocator.total();
        while let Some(next) =
            self.turns.next(self.waiting.iter().map(|prompt| &prompt.generation.tenant).enumerate())
        {
            let positions = self.waiting[next].generation.positions();
            let Ok(sequence) = self.allocator.sequence(positions) else {
                let wanted = pages_for(positions);
                if wanted <= total {
                    return;
                }
                self.waiting
                    .remove(next)
                    .into_iter()
                    .for_each(|it| it.fail(Error::TooLarge { wanted, total }));
                continue;
            };
            let Some(prompt) = self.waiting.remove(next) else { return };
            match Prefill::new(prompt, sequence, &self.decoder, self.block_rows) {
                Ok(prefill) => self.prefills.push(prefill),
                Err((prompt, error)) => prompt.fail(error),
            }
        }
    }

    /// Prefill work in turns: one step where nothing is being decoded, else as much as running sequences may wait for.
    /// False when there is none that can be done.
    fn prefill(&mut self) -> bool {
        let budget = if self.running.is_empty() { 1 } else { self.budget };
        let mut done = 0;
        while done < budget {
            let Some(next) = self.next() else { break };
            done += match next {
                Next::Section => self.encode(),
                Next::Prompt(index) => self.advance(index),
            }
            .max(1);
        }
        done > 0
    }

    fn next(&mut self) -> Option<Next> {
        let section = self.encoder.tenant().map(|tenant| (0, tenant));
        let able = self.prefills.iter().enumerate().filter(|(_, prefill)| prefill.can_step());
        let prompts = able.map(|(index, prefill)| (index + 1, prefill.tenant()));
        match self.turns.next(section.into_iter().chain(prompts))? {
            0 => Some(Next::Section),
            index => Some(Next::Prompt(index - 1)),
        }
    }

    fn encode(&mut self) -> usize {
        let tenant = self.encoder.tenant().cloned().unwrap_or_default();
        let (rows, complete) = self.encoder.step(&self.decoder);
        self.turns.charge(&tenant, rows as u64);
        if let Some((rows, took)) = complete {
            self.saw(rows, took);
        }
        rows
    }

    fn advance(&mut self, index: usize) -> usize {
        let prefill = &mut self.prefills[index];
        let rows = match prefill.step(&self.decoder, &mut self.pages) {
            Ok(rows) => rows,
            Err(error) => {
                self.prefills.remove(index).fail(error);
                return 0;
            }
        };
        self.turns.charge(prefill.tenant(), rows as u64);
        if prefill.done() {
            let prefill = self.prefills.remove(index);
            let shadows = prefill.shadows;
            match prefill.finish(&self.decoder) {
                Ok(ready) => match shadows {
                    Some(given) => crate::metrics::shadow(ready.first.token == given),
                    None => self.first_token(ready),
                },
                Err((prompt, error)) => prompt.fail(error),
            }
        }
        rows
    }

    fn first_token(&mut self, ready: Ready) {
        let Ready { prompt, first, spent } = ready;
        let (rows, token) = (prompt.generation.ids.len(), first.token);
        if prompt.generation.in_context() {
            self.saw(rows, spent);
        } else {
            crate::metrics::saved(self.rate.saved(rows, spent));
            let question = prompt.generation.assembly.question().len();
            // A worker that never computes a prompt in context knows by this what computing would cost.
            self.load.saw(first.selection.rows.len() + question, spent);
        }
        let shadow = self.shadow.turn(&prompt.generation).then(|| prompt.generation.shadow());
        self.running.extend(Running::start(prompt, first, &self.tokenizer));
        if let Some(generation) = shadow {
            self.compare(generation, token);
        }
    }

    /// Has a prompt computed in context, too, to see whether its first token is the one that was given. Left out where
    /// others need the pages.
    fn compare(&mut self, generation: super::Generation, given: u32) {
        let Ok(sequence) = self.allocator.sequence(generation.ids.len()) else { return };
        let owed = self.load.owe(generation.ids.len());
        let prompt = Prompt { generation: Box::new(generation), events: mpsc::channel(1).0, _owed: owed };
        if let Ok(mut prefill) = Prefill::new(prompt, sequence, &self.decoder, self.block_rows) {
            prefill.shadows = Some(given);
            self.prefills.push(prefill);
        }
    }

    fn saw(&mut self, rows: usize, took: std::time::Duration) {
        self.rate.saw(rows, took);
        self.load.saw(rows, took);
    }

    /// One token for every running sequence; false when there is none.
    fn decode(&mut self) -> bool {
        if self.running.is_empty() {
            return false;
        }
        let vocab = self.decoder.config().vocab;
        for running in self.running.chunks_mut(BATCH) {
            let count = running.len();
            let (mut ids, mut positions, mut tables) = ([0; BATCH], [0; BATCH], [&[][..]; BATCH]);
            for (i, running) in running.iter().enumerate() {
                (ids[i], positions[i]) = running.next();
                tables[i] = running.table();
            }
            let batch =
                Batch { ids: &ids[..count], positions: &positions[..count], tables: &tables[..count] };
            if let Err(error) = self.decoder.decode(&mut self.pages, batch, &mut self.logits) {
                // A device fault is nobody's in particular.
                tracing::error!(%error, "a decoding step failed");
                running.iter_mut().for_each(|running| running.fail(Error::Stopped));
                continue;
            }
            for (running, logits) in running.iter_mut().zip(self.logits.chunks_exact(vocab)) {
                running.take(logits);
            }
        }
        self.running.retain(|running| !running.ended());
        true
    }

    fn report(&self) {
        let waiting = self.waiting.len() + self.prefills.len() + self.encoder.len();
        self.load.waiting.store(waiting as u32, Ordering::Relaxed);
        self.load.running.store(self.running.len() as u32, Ordering::Relaxed);
        let queued = self.inbox.prompts.len() + self.inbox.sections.len();
        crate::metrics::requests(queued + waiting, self.running.len());
        crate::metrics::pages(self.allocator.total() - self.allocator.free(), self.allocator.total());
        let most = (self.most_pages + self.encoder.most_pages()) as u64;
        let element = self.decoder.device().dtype().size();
        crate::metrics::pages_peak(most * page_bytes(self.decoder.config(), element));
    }
}
