//! A model without services around it: random weights of a named shape, and pages for one sequence.

use super::bed::{Common, named};
use super::measure::use_threads;
use cacheclip_model::config::Config;
use cacheclip_model::load::{Source, load};
use cacheclip_model::pages::{Allocator, Sequence, pages_for};
use cacheclip_model::{Cpu, Decoder, Device, Pass};
use std::ops::Range;

/// The shape that was asked for, with positions for `tokens`. Sets the threads of every kernel, so comes first.
pub(crate) fn shape(common: &Common, tokens: usize) -> anyhow::Result<Config> {
    use_threads(common.threads)?;
    let config = named(&common.shape)?;
    Ok(Config { max_positions: config.max_positions.max(tokens), ..config })
}

/// A decoder of that shape.
pub(crate) fn decoder(shape: &Config) -> anyhow::Result<Decoder<Cpu>> {
    Ok(load(&Source::Random { config: shape.clone(), seed: 1 }, Cpu)?.decoder)
}

/// One sequence of arbitrary tokens.
pub(crate) struct Alone<'a> {
    decoder: &'a Decoder<Cpu>,
    pages: <Cpu as Device>::Pages,
    sequence: Sequence,
    ids: Vec<u32>,
    positions: Vec<u32>,
}

impl<'a> Alone<'a> {
    pub(crate) fn new(decoder: &'a Decoder<Cpu>, tokens: usize) -> anyhow::Result<Self> {
        let allocator = Allocator::new(pages_for(tokens));
        let vocab = decoder.config().vocab as u32;
        Ok(Self {
            decoder,
            pages: decoder.pages(allocator.total())?,
            sequence: allocator.sequence(tokens)?,
            ids: (0..tokens as u32).map(|i| i.wrapping_mul(7919) % vocab).collect(),
            positions: (0..tokens as u32).collect(),
        })
    }

    /// Tokens of the sequence.
    pub(crate) fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Runs these rows, as `asked` changes the pass; what comes out of it.
    pub(crate) fn pass<'p>(
        &'p mut self,
        rows: Range<usize>,
        asked: impl FnOnce(Pass<'p>) -> Pass<'p>,
    ) -> anyhow::Result<Vec<f32>> {
        let (ids, positions) = (&self.ids[rows.clone()], &self.positions[rows]);
        let pass = asked(Pass::new(ids, positions, self.sequence.table()));
        Ok(self.decoder.forward(&mut self.pages, pass)?)
    }
}
