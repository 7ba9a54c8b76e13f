//! One task through all policies and ratios, on one thread.

use super::Error;
use super::agreement::{self, Agreement};
use super::judge::{Reader, Verdict};
use super::pair::{Desk, Pair, ascending};
use super::policies::{Attention, Policy, View};
use super::prepare::{KvError, Prepared};
use super::reference::{Columns, Reference, Reshape};
use super::scene::Sections;
use super::signals::{AuxPrompt, Instruments, Signal, measure};
use super::task::Task;
use cacheclip_model::Logits;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// A policy at a ratio; none for policies that have a budget of their own.
#[derive(Clone, Copy, Debug)]
pub struct Cell<'a> {
    /// The policy.
    pub policy: &'a dyn Policy,
    /// Ratio asked for.
    pub ratio: Option<f32>,
}

/// What a policy made of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Name of the policy.
    pub policy: String,
    /// Ratio asked for.
    pub ratio: Option<f32>,
    /// Recomputed reused rows divided by all reused rows.
    pub realised: f32,
    /// By the task's scoring, 0 to 1.
    pub score: f32,
    /// Mean KL(full prefill ‖ this) along the target, in nats.
    pub kl: f32,
    /// Whether the first token is full prefill's.
    pub first: bool,
}

/// What became of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Family of the task.
    pub family: String,
    /// Its number.
    pub index: usize,
    /// Full prefill's score.
    pub full: f32,
    /// Reused tokens.
    pub reused: usize,
    /// Tokens of the whole prompt.
    pub tokens: usize,
    /// One per policy and ratio.
    pub outcomes: Vec<Outcome>,
    /// Relative error of the stale cache.
    pub kv_error: KvError,
    /// How signals compare, where that was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub agreement: Vec<Agreement>,
    /// Seconds by stage.
    pub seconds: Vec<(String, f64)>,
}

/// A thread's desks and what it evaluates.
#[derive(Debug)]
pub struct Bench<'a> {
    primary: Desk<'a>,
    aux: Desk<'a>,
    reference: Option<&'a Reference>,
    seed: u64,
}

impl<'a> Bench<'a> {
    /// Desks for both models.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(pair: &'a Pair, reference: Option<&'a Reference>, seed: u64) -> Result<Self, Error> {
        Ok(Self { primary: Desk::new(&pair.primary)?, aux: Desk::new(&pair.aux)?, reference, seed })
    }

    /// Runs a task through all cells.
    ///
    /// # Errors
    /// A prompt that does not fit a model, a policy that cannot select, or a device fault.
    pub fn record(&mut self, task: &Task, cells: &[Cell<'_>], agreement: bool) -> Result<Record, Error> {
        let mut seconds: Vec<(String, f64)> = Vec::new();
        let mut began = Instant::now();
        let mut lap = |stage: &str| {
            add(&mut seconds, stage, began.elapsed().as_secs_f64());
            began = Instant::now();
        };
        let anchors: Vec<_> = cells.iter().map(|cell| cell.policy.anchor()).collect();
        let prepared = Prepared::new(&mut self.primary, task, &anchors)?;
        lap("full prefill and canonical KV");
        let mut wanted: Vec<Signal> = cells.iter().flat_map(|cell| cell.policy.needs()).collect();
        if agreement {
            wanted.extend(agreement::needs());
        }
        let aux = self.auxiliary(task, &wanted)?;
        lap("auxiliary KV");
        let mut tools =
            Instruments { primary: &mut self.primary, aux: &mut self.aux, reference: self.reference };
        let signals = measure(&mut tools, &prepared, aux.as_ref(), &wanted)?;
        lap("");
        let text = format!("{} {} {}", self.seed, task.family, task.index);
        let hash = blake3::hash(text.as_bytes());
        let lot = u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap_or_default());
        let mut outcomes = Vec::with_capacity(cells.len());
        for cell in cells {
            let assembly = prepared.assembly(cell.policy.anchor());
            let view = View { assembly, prepared: &prepared, signals: &signals, seed: lot };
            let rows = cell.policy.select(&view, cell.ratio.unwrap_or(1.0))?;
            let verdict = self.verdict(task, &prepared, cell.policy, &rows)?;
            outcomes.push(Outcome {
                policy: cell.policy.name().to_owned(),
                ratio: cell.ratio,
                realised: rows.len() as f32 / assembly.reused().len().max(1) as f32,
                score: verdict.score,
                kl: verdict.kl,
                first: verdict.first_agrees,
            });
        }
        lap("policies");
        let view = View {
            assembly: prepared.assembly(super::Anchor::Layout),
            prepared: &prepared,
            signals: &signals,
            seed: lot,
        };
        let agreement = if agreement { agreement::compare(&view)? } else { Vec::new() };
        // The lap without a name is the signals', which are told apart.
        seconds.retain(|(stage, _)| !stage.is_empty());
        signals.seconds.iter().for_each(|(stage, time)| add(&mut seconds, stage, *time));
        Ok(Record {
            family: task.family.clone(),
            index: task.index,
            full: prepared.full.score,
            reused: view.assembly.reused().len(),
            tokens: view.assembly.total(),
            outcomes,
            kv_error: prepared.kv_error(),
            agreement,
            seconds,
        })
    }

    /// The auxiliary side, where a signal needs it.
    ///
    /// # Errors
    /// A text that is too long for the auxiliary model.
    pub fn auxiliary(&mut self, task: &Task, wanted: &[Signal]) -> Result<Option<AuxPrompt>, Error> {
        if !wanted.iter().any(|it| matches!(it, Signal::Aux(..) | Signal::AuxPerChunk)) {
            return Ok(None);
        }
        let sections = Sections::of(self.aux.side(), task)?;
        Ok(Some(AuxPrompt::new(&mut self.aux, sections)?))
    }

    /// The primary's desk, the auxiliary's and the plain decoder.
    pub fn instruments(&mut self) -> Instruments<'a, '_> {
        Instruments { primary: &mut self.primary, aux: &mut self.aux, reference: self.reference }
    }

    /// Judges what the policy's cache answers when `rows` are recomputed.
    ///
    /// # Errors
    /// A device fault.
    pub fn verdict(
        &mut self,
        task: &Task,
        prepared: &Prepared,
        policy: &dyn Policy,
        rows: &[u32],
    ) -> Result<Verdict, Error> {
        let side = self.primary.side();
        let mut reader = match policy.attention() {
            Attention::InContext => return Ok(prepared.full),
            Attention::Engine => {
                let scene = prepared.assembled(policy.anchor());
                scene.place(&mut self.primary)?;
                let ids: Vec<u32> = rows.iter().map(|&row| scene.ids[row as usize]).collect();
                self.primary.compute(&ids, rows, Logits::None, None, None)?;
                Reader::of_desk(&mut self.primary, scene.end())
            }
            Attention::LocalPositions => {
                self.plain(prepared, side.anchor.len(), prepared.sections.end(), Reshape::NONE)?
            }
            Attention::Parallel(reshape) => {
                let prefix = prepared.sections.prefix.len();
                let longest = prepared.chunks().iter().map(|kv| kv.tokens()).max().unwrap_or_default();
                self.plain(prepared, prefix, prefix + longest, reshape)?
            }
        };
        reader.verdict(side, &prepared.sections.question, &prepared.target, &prepared.logits, task)
    }

    /// The stale cache in the plain decoder: every chunk's keys from position `first`, the question from `start`.
    fn plain(
        &self,
        prepared: &Prepared,
        first: usize,
        start: usize,
        reshape: Reshape,
    ) -> Result<Reader<'a, 'a>, Error> {
        let why = "a policy with an attention of its own needs the plain decoder";
        let reference = self.reference.ok_or_else(|| Error::Settings(why.into()))?;
        let mut columns = Columns::default();
        let prefix = prepared.sections.prefix.len();
        reference.place(&mut columns, &prepared.prefix, &ascending(0, prefix));
        for kv in prepared.chunks() {
            reference.place(&mut columns, kv, &ascending(first, kv.tokens()));
        }
        columns.context = prefix..columns.count();
        Ok(Reader::Plain { reference, cached: columns.count(), columns, start, reshape })
    }
}

fn add(seconds: &mut Vec<(String, f64)>, stage: &str, time: f64) {
    match seconds.iter_mut().find(|(known, _)| known == stage) {
        Some((_, sum)) => *sum += time,
        None => seconds.push((stage.to_owned(), time)),
    }
}
