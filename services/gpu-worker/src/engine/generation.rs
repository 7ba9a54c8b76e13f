//! One request inside the engine: what it needs, and how its tokens come out.

use super::{Compute, Error};
use cacheclip_chunk::ByteSpan;
use cacheclip_model::kv::ChunkKv;
use cacheclip_model::pages::Sequence;
use cacheclip_model::sample::{Options, Sampler, StopTexts};
use cacheclip_model::{Decoder, Device, Pass};
use cacheclip_plan::{Assembly, Policy, Rung, Scored, Selection};
use cacheclip_prompt::{Detokenizer, Tokenizer};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// A section's KV and where it stands in the prompt.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    /// First position.
    pub start: usize,
    /// Canonical KV.
    pub kv: ChunkKv,
}

/// Everything the engine needs for one answer.
#[derive(Debug)]
pub(crate) struct Generation {
    /// The whole prompt.
    pub ids: Vec<u32>,
    /// Its rows.
    pub assembly: Assembly,
    /// Prefix and chunks with their KV; unused when the prompt is computed in context.
    pub placed: Vec<Placed>,
    /// How rows are chosen.
    pub policy: Policy,
    /// Asked-for ratio.
    pub ratio: Option<f32>,
    /// The scorer's spans per chunk.
    pub scored: Option<Arc<Vec<Vec<Scored>>>>,
    /// Byte spans of each chunk's rows.
    pub spans: Vec<Vec<ByteSpan>>,
    /// Static rank per reused row.
    pub rank: Option<Vec<f32>>,
    /// Whether the static rank is fused where the scorer answered, too.
    pub fuse_rank: bool,
    /// Whether to probe the primary's own question attention.
    pub probe: bool,
    /// Where the scores came from.
    pub rung: Rung,
    /// How tokens are drawn.
    pub sampling: Options,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end the answer.
    pub eos: Vec<u32>,
    /// When the request reached the worker.
    pub received: Instant,
    /// When it was handed to the engine.
    pub queued: Instant,
}

impl Generation {
    /// Whether the whole prompt is computed in context, nothing reused.
    pub(crate) fn in_context(&self) -> bool {
        self.policy == Policy::Full || self.rung == Rung::FullPrefill
    }

    /// The ratio asked for, or the policy's own.
    pub(super) fn nominal(&self) -> f32 {
        self.ratio.unwrap_or_else(|| self.policy.default_ratio())
    }

    /// Positions the sequence may come to hold.
    pub(super) fn positions(&self) -> usize {
        self.ids.len() + self.max_tokens
    }
}

/// What comes out.
#[derive(Debug)]
pub(crate) enum Event {
    /// Text of one or more tokens.
    Text(String),
    /// The answer is complete.
    Done(Box<Outcome>),
    /// The answer cannot be completed.
    Failed(Error),
}

/// How a generation ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The whole answer.
    pub text: String,
    /// Tokens generated, the one that ended it included.
    pub tokens: usize,
    /// Whether it ended by itself (end token or stop text), not by length.
    pub stopped: bool,
    /// What was recomputed.
    pub selection: Selection,
    /// From the worker's receipt to the first token.
    pub ttft: Duration,
    /// Seconds by stage.
    pub stages: Vec<(&'static str, f64)>,
}

/// A sequence whose first token is known.
#[derive(Debug)]
pub(super) struct First {
    pub(super) token: u32,
    pub(super) sampler: Sampler,
    pub(super) sequence: Sequence,
    pub(super) selection: Selection,
    pub(super) stages: Vec<(&'static str, f64)>,
    pub(super) ttft: Duration,
}

/// A sequence that is being decoded.
pub(super) struct Running {
    first: First,
    next: u32,
    position: usize,
    generated: usize,
    max_tokens: usize,
    eos: Vec<u32>,
    stops: StopTexts,
    text: Detokenizer,
    events: mpsc::Sender<Event>,
    began: Instant,
}

impl Running {
    /// Emits the first token; `None` when that was the whole answer.
    pub(super) fn start(
        generation: Generation,
        first: First,
        events: mpsc::Sender<Event>,
        tokenizer: &Tokenizer,
    ) -> Option<Self> {
        let mut running = Self {
            next: first.token,
            first,
            position: generation.ids.len(),
            generated: 0,
            max_tokens: generation.max_tokens,
            eos: generation.eos,
            stops: StopTexts::new(generation.stop),
            text: Detokenizer::new(tokenizer.clone()),
            events,
            began: Instant::now(),
        };
        running.emit().then_some(running)
    }

    /// Decodes and emits one token; false when the sequence has ended.
    pub(super) fn step(
        &mut self,
        decoder: &Decoder<Compute>,
        pages: &mut <Compute as Device>::Pages,
    ) -> bool {
        if self.events.is_closed() {
            return false;
        }
        let (ids, positions) = ([self.next], [self.position as u32]);
        let pass = Pass::new(&ids, &positions, self.first.sequence.table());
        let drawn = decoder.forward(pages, pass).and_then(|logits| self.first.sampler.next(&logits));
        match drawn {
            Ok(token) => {
                self.next = token;
                self.position += 1;
                self.emit()
            }
            Err(error) => {
                super::fail(&self.events, error.into());
                false
            }
        }
    }

    /// Sends what `next` adds to the text; true while the answer goes on.
    fn emit(&mut self) -> bool {
        self.generated += 1;
        if self.eos.contains(&self.next) {
            return self.finish(true);
        }
        let (shown, stopped) = self.stops.push(&self.text.push(self.next));
        self.send_text(shown);
        if stopped || self.generated >= self.max_tokens {
            return self.finish(stopped);
        }
        true
    }

    fn send_text(&self, text: String) {
        if !text.is_empty() {
            // Room for every event was reserved; a closed channel is noticed at the next step.
            let _ = self.events.try_send(Event::Text(text));
        }
    }

    fn finish(&mut self, stopped: bool) -> bool {
        let rest = self.stops.flush();
        self.send_text(rest);
        let mut stages = std::mem::take(&mut self.first.stages);
        stages.push(("decode", self.began.elapsed().as_secs_f64()));
        let outcome = Outcome {
            text: self.stops.shown().to_owned(),
            tokens: self.generated,
            stopped,
            selection: self.first.selection.clone(),
            ttft: self.first.ttft,
            stages,
        };
        let _ = self.events.try_send(Event::Done(Box::new(outcome)));
        false
    }
}
