//! One request inside the engine: what it needs, and how its tokens come out.

use super::Error;
use super::job::{Prompt, fail};
use super::turns::Tenant;
use crate::incoming::Kv;
use cacheclip_chunk::ByteSpan;
use cacheclip_model::pages::Sequence;
use cacheclip_model::sample::{Options, Sampler, StopTexts};
use cacheclip_plan::{Assembly, Policy, Rung, Scored, Selection};
use cacheclip_prompt::{Detokenizer, Tokenizer};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// A section's KV and where it stands in the prompt.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    /// First position of each of its places.
    pub starts: Vec<usize>,
    /// Canonical KV; layers may still be on their way.
    pub kv: Kv,
}

/// Everything the engine needs for one answer.
#[derive(Debug)]
pub(crate) struct Generation {
    /// The whole prompt.
    pub ids: Vec<u32>,
    /// Its rows.
    pub assembly: Assembly,
    /// Whose request it is.
    pub tenant: Tenant,
    /// Prefix and chunks with their KV, each once; unused when the prompt is computed in context.
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

    /// The same prompt, to be computed in context.
    pub(super) fn shadow(&self) -> Self {
        Self {
            ids: self.ids.clone(),
            assembly: self.assembly.clone(),
            tenant: Tenant::clone(&self.tenant),
            placed: Vec::new(),
            policy: Policy::Full,
            ratio: None,
            scored: None,
            spans: Vec::new(),
            rank: None,
            fuse_rank: false,
            probe: false,
            rung: Rung::None,
            sampling: Options::default(),
            max_tokens: 0,
            stop: Vec::new(),
            eos: Vec::new(),
            received: Instant::now(),
            queued: Instant::now(),
        }
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
    ended: bool,
}

impl Running {
    /// Emits the first token; `None` when that was the whole answer.
    pub(super) fn start(prompt: Prompt, first: First, tokenizer: &Tokenizer) -> Option<Self> {
        let Prompt { generation, events, .. } = prompt;
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
            ended: false,
        };
        running.emit();
        (!running.ended).then_some(running)
    }

    /// Whether the answer is complete or failed.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Whether the caller went away.
    pub(super) fn abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// The token to compute next, and its position.
    pub(super) fn next(&self) -> (u32, u32) {
        (self.next, self.position as u32)
    }

    /// The sequence's pages.
    pub(super) fn table(&self) -> &[u32] {
        self.first.sequence.table()
    }

    /// Draws a token from the logits of the last one and emits it.
    pub(super) fn take(&mut self, logits: &[f32]) {
        match self.first.sampler.next(logits) {
            Ok(token) => {
                self.next = token;
                self.position += 1;
                self.emit();
            }
            Err(error) => self.fail(error.into()),
        }
    }

    /// Tells the reader that the answer cannot be completed.
    pub(super) fn fail(&mut self, error: Error) {
        self.ended = true;
        fail(&self.events, error);
    }

    /// Sends what `next` adds to the text.
    fn emit(&mut self) {
        self.generated += 1;
        if self.eos.contains(&self.next) {
            return self.finish(true);
        }
        let (shown, stopped) = self.stops.push(&self.text.push(self.next));
        self.send_text(shown);
        if stopped || self.generated >= self.max_tokens {
            self.finish(stopped);
        }
    }

    fn send_text(&self, text: String) {
        if !text.is_empty() {
            // Room for every event was reserved; a closed channel is noticed at the next step.
            let _ = self.events.try_send(Event::Text(text));
        }
    }

    fn finish(&mut self, stopped: bool) {
        self.ended = true;
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
    }
}
