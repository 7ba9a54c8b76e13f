//! From sections to a first token, in steps of one block of rows through one layer: assembly, selection, repair.
//!
//! A section's KV is placed as it comes, whatever layer it is of, and is nowhere else then. A request begins when the
//! first layers have come, and computes while the others are on their way.

use super::Error;
use super::generation::{First, Generation, Placed};
use super::job::Prompt;
use super::turns::Tenant;
use crate::incoming::Kv;
use cacheclip_model::device::At;
use cacheclip_model::kv::{ChunkKv, LayerKv};
use cacheclip_model::pages::Sequence;
use cacheclip_model::sample::Sampler;
use cacheclip_model::{Collect, Decoder, Device, Logits, Probe, Reduce, Walk};
use cacheclip_plan::{Rung, Selection, Signals, select};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A prompt on its way to its first token.
pub(super) struct Prefill<D: Device> {
    pub(super) prompt: Prompt,
    sequence: Sequence,
    walk: Walk<D>,
    block_rows: usize,
    goal: Goal,
    /// Sections that are not placed at all layers.
    sections: Vec<Section>,
    admitted: Instant,
    stages: Stages,
    /// Of a shadow: the first token that was given; nobody reads what comes out.
    pub(super) shadows: Option<u32>,
}

/// A section on its way into the pages.
struct Section {
    placed: Placed,
    /// Layers that are there.
    layers: usize,
}

/// What the rows that are under way are for.
enum Goal {
    /// The primary's own question attention on the stale cache.
    Probe(Probe),
    /// The first token, with these rows recomputed.
    Repair(Selection),
}

/// Own time by stage, in order of first use.
#[derive(Debug, Default)]
struct Stages(Vec<(&'static str, Duration)>);

impl Stages {
    fn add(&mut self, name: &'static str, took: Duration) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += took,
            None => self.0.push((name, took)),
        }
    }

    fn sum(&self) -> Duration {
        self.0.iter().map(|(_, took)| *took).sum()
    }
}

/// A prompt whose first token is known.
pub(super) struct Ready {
    pub(super) prompt: Prompt,
    pub(super) first: First,
    /// Own time, other requests' turns left out.
    pub(super) spent: Duration,
}

impl<D: Device> Prefill<D> {
    /// Admits a prompt to the pages of `sequence`.
    ///
    /// # Errors
    /// A selection that is impossible as asked; a device without memory for the rows.
    pub(super) fn new(
        mut prompt: Prompt,
        sequence: Sequence,
        decoder: &Decoder<D>,
        block_rows: usize,
    ) -> Result<Self, (Prompt, Error)> {
        let placed = std::mem::take(&mut prompt.generation.placed);
        let generation = &*prompt.generation;
        let question = generation.assembly.question();
        let mut stages = Stages::default();
        stages.add("queue", generation.queued.elapsed());
        let begun = if generation.in_context() {
            let positions = (0..generation.ids.len() as u32).collect();
            let selection = Selection::in_context(&generation.assembly, generation.nominal());
            decoder
                .walk(&generation.ids, positions, Logits::Last, block_rows)
                .map(|walk| (walk, Goal::Repair(selection)))
                .map_err(Error::from)
        } else if generation.probe {
            let positions: Vec<u32> = (question.start as u32..question.end as u32).collect();
            let layers = 0..decoder.config().layers;
            let reused = generation.assembly.reused();
            let probe = Probe::new(positions[0], reused.end, layers, Reduce::Max, Reduce::Max);
            decoder
                .walk(&generation.ids[question], positions, Logits::None, block_rows)
                .map(|walk| (walk, Goal::Probe(probe)))
                .map_err(Error::from)
        } else {
            let began = Instant::now();
            let begun = plan(generation, None).and_then(|selection| {
                let walk = repair(generation, &selection, decoder, block_rows)?;
                Ok((walk, Goal::Repair(selection)))
            });
            stages.add("plan", began.elapsed());
            begun
        };
        let (walk, goal) = match begun {
            Ok(begun) => begun,
            Err(error) => return Err((prompt, error)),
        };
        let sections = match generation.in_context() {
            true => Vec::new(),
            false => placed.into_iter().map(|placed| Section { placed, layers: 0 }).collect(),
        };
        Ok(Self {
            prompt,
            sequence,
            walk,
            block_rows,
            goal,
            sections,
            admitted: Instant::now(),
            stages,
            shadows: None,
        })
    }

    /// Whether the caller went away.
    pub(super) fn abandoned(&self) -> bool {
        self.shadows.is_none() && self.prompt.events.is_closed()
    }

    /// Whose turn it takes.
    pub(super) fn tenant(&self) -> &Tenant {
        &self.prompt.generation.tenant
    }

    /// Whether there is KV to place, or all KV is placed that the next rows need.
    pub(super) fn can_step(&self) -> bool {
        self.sections.iter().any(Section::has_come) || self.can_compute()
    }

    fn can_compute(&self) -> bool {
        let layer = self.walk.layer();
        self.sections.iter().all(|section| section.layers > layer)
    }

    /// Places what has come and takes one block of rows through one layer, if it can; returns the rows.
    ///
    /// # Errors
    /// The device or the model failed.
    pub(super) fn step(&mut self, decoder: &Decoder<D>, pages: &mut D::Pages) -> Result<usize, Error> {
        let began = Instant::now();
        if self.place(decoder, pages)? {
            self.stages.add("place", began.elapsed());
        }
        if !self.can_compute() {
            return Ok(0);
        }
        let (rows, began) = (self.walk.next_rows(), Instant::now());
        let (stage, probe) = match &mut self.goal {
            Goal::Probe(probe) => ("probe", Some(probe)),
            Goal::Repair(_) if self.prompt.generation.in_context() => ("prefill", None),
            Goal::Repair(_) => ("recompute", None),
        };
        let collect = Collect { export: None, probe };
        decoder.step(pages, &mut self.walk, self.sequence.table(), collect)?;
        self.stages.add(stage, began.elapsed());
        if self.walk.done()
            && let Goal::Probe(probe) = &self.goal
        {
            let began = Instant::now();
            let generation = &*self.prompt.generation;
            let probed = probe.scores().split_off(generation.assembly.reused().start);
            let selection = plan(generation, Some(&probed))?;
            self.walk = repair(generation, &selection, decoder, self.block_rows)?;
            self.goal = Goal::Repair(selection);
            self.stages.add("plan", began.elapsed());
        }
        Ok(rows)
    }

    /// Places what has come, and lets go of that; whether there was any.
    fn place(&mut self, decoder: &Decoder<D>, pages: &mut D::Pages) -> Result<bool, Error> {
        let (table, layers) = (self.sequence.table(), decoder.config().layers);
        // Sections together: a device places them in one go.
        let (mut parts, mut whole) = (BTreeMap::<usize, Vec<_>>::new(), Vec::new());
        // Leave to hold what is in `whole`.
        let mut held = Vec::new();
        for Section { placed: Placed { starts, kv }, layers: there } in &mut self.sections {
            let came = match kv {
                Kv::Here(kv) => {
                    *there = layers;
                    whole.push((kv.clone(), &starts[..]));
                    continue;
                }
                Kv::Coming(kv) => kv.take(),
            };
            if came.len() == layers {
                *there = layers;
                let kv = ChunkKv::shared(came.iter().map(|layer| Arc::clone(&layer.kv)).collect());
                whole.push((kv, &starts[..]));
                held.extend(came);
                continue;
            }
            for layer in came {
                parts.entry(*there).or_default().push((layer, &starts[..]));
                *there += 1;
            }
        }
        if parts.is_empty() && whole.is_empty() {
            return Ok(false);
        }
        // Before the others: these are few, and computing waits for all that was placed in its layer.
        for (layer, sections) in parts {
            let sections: Vec<(&LayerKv, usize)> =
                sections.iter().flat_map(|(layer, starts)| at_all(&*layer.kv, starts)).collect();
            decoder.place_sections(pages, At { layer, table }, &sections)?;
        }
        let sections: Vec<(&ChunkKv, usize)> =
            whole.iter().flat_map(|(kv, starts)| at_all(kv, starts)).collect();
        decoder.place_all(pages, table, &sections)?;
        self.sections.retain(|section| section.layers < layers);
        Ok(true)
    }

    /// Whether the first token can be drawn.
    pub(super) fn done(&self) -> bool {
        self.walk.done()
    }

    /// Tells the caller that nothing comes of it.
    pub(super) fn fail(self, error: Error) {
        self.prompt.fail(error);
    }

    /// Draws the first token.
    ///
    /// # Errors
    /// Logits that are no numbers.
    pub(super) fn finish(mut self, decoder: &Decoder<D>) -> Result<Ready, (Prompt, Error)> {
        let began = Instant::now();
        let mut sampler = Sampler::new(self.prompt.generation.sampling);
        let token = match decoder.logits(self.walk).and_then(|logits| sampler.next(&logits)) {
            Ok(token) => token,
            Err(error) => return Err((self.prompt, error.into())),
        };
        self.stages.add("first_token", began.elapsed());
        let Goal::Repair(selection) = self.goal else {
            unreachable!("a probe's walk is followed by the repair's");
        };
        let queued = self.stages.0.first().map_or(Duration::ZERO, |(_, took)| *took);
        let spent = self.stages.sum() - queued;
        // For KV that was on its way, and for others' turns.
        self.stages.add("wait", self.admitted.elapsed().saturating_sub(spent));
        let stages = self.stages.0.iter().map(|(name, took)| (*name, took.as_secs_f64())).collect();
        let ttft = self.prompt.generation.received.elapsed();
        let first = First { token, sampler, sequence: self.sequence, selection, stages, ttft };
        Ok(Ready { prompt: self.prompt, first, spent })
    }
}

impl Section {
    fn has_come(&self) -> bool {
        match &self.placed.kv {
            Kv::Here(_) => true,
            Kv::Coming(kv) => kv.waits(),
        }
    }
}

/// The same KV at each of its places.
fn at_all<'a, T>(kv: &'a T, starts: &'a [usize]) -> impl Iterator<Item = (&'a T, usize)> {
    starts.iter().map(move |&start| (kv, start))
}

/// The rows to recompute and the question, at the first layer.
fn repair<D: Device>(
    generation: &Generation,
    selection: &Selection,
    decoder: &Decoder<D>,
    block_rows: usize,
) -> Result<Walk<D>, Error> {
    let question = generation.assembly.question();
    let rows: Vec<u32> =
        selection.rows.iter().copied().chain(question.start as u32..question.end as u32).collect();
    let ids: Vec<u32> = rows.iter().map(|&row| generation.ids[row as usize]).collect();
    Ok(decoder.walk(&ids, rows, Logits::Last, block_rows)?)
}

fn plan(generation: &Generation, probed: Option<&[f32]>) -> Result<Selection, Error> {
    let ranked = generation.rung == Rung::StaticRank || generation.fuse_rank;
    let signals = Signals {
        scored: generation.scored.as_deref().map(Vec::as_slice),
        spans: generation.spans.iter().map(Vec::as_slice).collect(),
        probe: probed,
        rank: generation.rank.as_deref().filter(|_| ranked),
    };
    if generation.assembly.candidate_rows() == 0 {
        return Ok(Selection::new(&generation.assembly, Vec::new(), generation.nominal()));
    }
    Ok(select(&generation.assembly, &generation.policy, generation.ratio, &signals)?)
}
