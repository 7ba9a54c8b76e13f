//! What an instance proves about itself before it may reuse KV.
//!
//! Three equalities with full prefill, on this machine, with these weights: a repaired prompt whose every row
//! was recomputed, a prompt whose head came from stored KV, and stored keys rotated to where they would have
//! been computed. Two negative controls — stale KV left unrepaired, keys rotated by another base — must miss
//! by far more than the device's tolerance ([`Precision`]), so that a check which cannot fail is noticed. No certificate,
//! no reuse.

use crate::decoder::{Decoder, Logits, Pass};
use crate::device::{Device, Precision};
use crate::error::Error;
use crate::kv::{ChunkKv, Export};
use crate::pages::Allocator;
use cacheclip_kernels::page::pages_for;
use std::fmt;

/// Passed checks with the relative error of each.
#[derive(Clone, Debug, PartialEq)]
pub struct Certificate {
    /// Name of the check and its relative error.
    pub checks: Vec<(&'static str, f32)>,
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> =
            self.checks.iter().map(|(name, error)| format!("{name} {error:.1e}")).collect();
        f.write_str(&parts.join(", "))
    }
}

/// `max |a − b| / max |b|`.
pub fn relative_error(a: &[f32], b: &[f32]) -> f32 {
    let scale = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let worst = a
        .iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0f32, |m, d| if d > m || d.is_nan() { d } else { m });
    if a.len() == b.len() { worst / scale.max(f32::MIN_POSITIVE) } else { f32::INFINITY }
}

/// Proves an instance.
///
/// # Errors
/// [`Error::Certificate`] with the first check that failed, or a device fault.
pub fn certify<D: Device>(decoder: &Decoder<D>) -> Result<Certificate, Error> {
    let bench = Bench::new(decoder)?;
    let Precision { tolerance, control: least } = decoder.device().precision();
    let mut checks = Vec::new();
    let mut check = |name, error: f32, control: bool| {
        let passed = if control { error > least } else { error < tolerance };
        checks.push((name, error));
        let limit = if control { least } else { tolerance };
        if passed { Ok(()) } else { Err(Error::Certificate { check: name, error, limit }) }
    };
    let full = bench.full()?;
    check("all rows recomputed", relative_error(&bench.repaired(1)?, &full), false)?;
    check("prefix hit", relative_error(&bench.resumed(decoder)?, &full), false)?;
    check("rotated when placed", relative_error(&bench.placed_in_context(decoder)?, &full), false)?;
    check("control: nothing recomputed", relative_error(&bench.repaired(usize::MAX)?, &full), true)?;
    let bent = decoder.with_theta(decoder.config().rope_theta * 3.0 + 7.0);
    check("control: wrong rotation", relative_error(&bench.placed_in_context(&bent)?, &full), true)?;
    Ok(Certificate { checks })
}

/// One prompt: an anchor, two chunks and a question, of pseudo-random ids.
struct Bench<'a, D: Device> {
    decoder: &'a Decoder<D>,
    ids: Vec<u32>,
    positions: Vec<u32>,
    allocator: Allocator,
}

const ANCHOR: usize = 5;
const CHUNK: usize = 21;
const QUESTION: usize = 9;

impl<'a, D: Device> Bench<'a, D> {
    fn new(decoder: &'a Decoder<D>) -> Result<Self, Error> {
        let total = ANCHOR + 2 * CHUNK + QUESTION;
        let vocab = decoder.config().vocab as u64;
        let ids = (1..=total as u64).map(|i| ((i * 2_654_435_761) % vocab) as u32).collect();
        Ok(Self {
            decoder,
            ids,
            positions: (0..total as u32).collect(),
            allocator: Allocator::new(2 * pages_for(total)),
        })
    }

    fn pages(&self) -> Result<D::Pages, Error> {
        self.decoder.pages(self.allocator.total())
    }

    fn tail<'b>(&'b self, from: usize, table: &'b [u32]) -> Pass<'b> {
        Pass::new(&self.ids[from..], &self.positions[from..], table)
    }

    /// Logits of the last row after full prefill.
    fn full(&self) -> Result<Vec<f32>, Error> {
        let sequence = self.allocator.sequence(self.ids.len())?;
        self.decoder.forward(&mut self.pages()?, self.tail(0, sequence.table()))
    }

    /// Canonical KV of the second chunk: anchor and chunk alone, anchor stripped.
    fn canonical(&self) -> Result<ChunkKv, Error> {
        let second = ANCHOR + CHUNK..ANCHOR + 2 * CHUNK;
        let ids = [&self.ids[..ANCHOR], &self.ids[second]].concat();
        let sequence = self.allocator.sequence(ids.len())?;
        let mut export = Export::default();
        let pass = Pass {
            logits: Logits::None,
            export: Some(&mut export),
            ..Pass::new(&ids, &self.positions[..ids.len()], sequence.table())
        };
        self.decoder.forward(&mut self.pages()?, pass)?;
        Ok(export.finish(ANCHOR, self.decoder.config().head_dim))
    }

    /// KV of rows `range` as full prefill computes it.
    fn in_context(&self, range: std::ops::Range<usize>) -> Result<ChunkKv, Error> {
        let sequence = self.allocator.sequence(range.end)?;
        let mut export = Export::default();
        let pass = Pass {
            logits: Logits::None,
            export: Some(&mut export),
            ..Pass::new(&self.ids[..range.end], &self.positions[..range.end], sequence.table())
        };
        self.decoder.forward(&mut self.pages()?, pass)?;
        Ok(export.finish(range.start, self.decoder.config().head_dim))
    }

    /// The second chunk placed stale, every `step`-th of its rows recomputed, then the question.
    fn repaired(&self, step: usize) -> Result<Vec<f32>, Error> {
        let sequence = self.allocator.sequence(self.ids.len())?;
        let (mut pages, table) = (self.pages()?, sequence.table());
        let start = ANCHOR + CHUNK;
        let head =
            Pass { logits: Logits::None, ..Pass::new(&self.ids[..start], &self.positions[..start], table) };
        self.decoder.forward(&mut pages, head)?;
        self.decoder.place(&mut pages, table, &self.canonical()?, start)?;
        let question = start + CHUNK;
        let rows = (start..question)
            .filter(|row| step != usize::MAX && row % step == 0)
            .chain(question..self.ids.len());
        let rows: Vec<usize> = rows.collect();
        let ids: Vec<u32> = rows.iter().map(|&row| self.ids[row]).collect();
        let positions: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        self.decoder.forward(&mut pages, Pass::new(&ids, &positions, table))
    }

    /// The head of the prompt from stored KV, the rest computed.
    fn resumed(&self, placer: &Decoder<D>) -> Result<Vec<f32>, Error> {
        self.placed(placer, 0..ANCHOR + CHUNK)
    }

    /// A middle section's KV, taken in context without rotation, rotated to the same positions by placing.
    fn placed_in_context(&self, placer: &Decoder<D>) -> Result<Vec<f32>, Error> {
        self.placed(placer, ANCHOR + CHUNK..ANCHOR + 2 * CHUNK)
    }

    fn placed(&self, placer: &Decoder<D>, range: std::ops::Range<usize>) -> Result<Vec<f32>, Error> {
        let sequence = self.allocator.sequence(self.ids.len())?;
        let (mut pages, table) = (self.pages()?, sequence.table());
        if range.start > 0 {
            let (ids, positions) = (&self.ids[..range.start], &self.positions[..range.start]);
            self.decoder
                .forward(&mut pages, Pass { logits: Logits::None, ..Pass::new(ids, positions, table) })?;
        }
        let end = range.end;
        placer.place(&mut pages, table, &self.in_context(range.clone())?, range.start)?;
        self.decoder.forward(&mut pages, self.tail(end, table))
    }
}
