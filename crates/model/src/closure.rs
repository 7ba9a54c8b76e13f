//! Closure of importance scores over links: what important tokens look at becomes important, too.
//!
//! A question seldom looks at the far end of a chain; what names the next link does. Each round takes the best tokens so
//! far, computes them again in context, and scores the tokens of *other* chunks that they attend to by the largest
//! attention over heads and layers, times the score of the token that points. The idea of scoring a token through the
//! tokens that look at it is attention rollout's (Abnar and Zuidema, arXiv 2005.00928), cut to a few rows per round.

use crate::decoder::{Decoder, Logits, Pass, Probe};
use crate::device::Device;
use crate::error::Error;
use cacheclip_kernels::probe::Reduce;

/// Rounds that scorers make: one per link that may stand between a question and its answer.
pub const ROUNDS: usize = 2;
/// Share of the chunks' tokens that is followed in each round.
const SHARE: f32 = 0.02;
/// Most tokens that are followed in a round: what a round costs grows with them and with the prompt.
const MOST: usize = 32;

/// Chunks behind a prefix, in a sequence whose pages hold their KV.
#[derive(Clone, Copy, Debug)]
pub struct Chunks<'a> {
    /// The sequence's pages.
    pub table: &'a [u32],
    /// First position of each chunk, then the end of the last.
    pub starts: &'a [usize],
}

impl Chunks<'_> {
    /// The chunk that a position behind the prefix belongs to.
    pub fn of(&self, position: usize) -> usize {
        self.starts.partition_point(|&start| start <= position) - 1
    }
}

/// One round. `scores` has one number per position up to the last chunk's end, and is scaled to a largest of 1 among the
/// chunks'; `id` tells the token at a position. Returns the positions of the tokens followed, in order: their KV is no
/// longer what it was, but that of their tokens in context.
///
/// # Errors
/// A device fault.
pub fn follow<D: Device>(
    decoder: &Decoder<D>,
    pages: &mut D::Pages,
    chunks: Chunks<'_>,
    id: impl Fn(usize) -> u32,
    scores: &mut [f32],
) -> Result<Vec<usize>, Error> {
    let (first, end) = (chunks.starts[0], scores.len());
    let peak = scores[first..].iter().fold(f32::MIN_POSITIVE, |a, &b| a.max(b));
    scores.iter_mut().for_each(|score| *score /= peak);
    let mut best: Vec<usize> = (first..end).collect();
    best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    best.truncate((((end - first) as f32 * SHARE).round() as usize).clamp(1, MOST));
    best.sort_unstable();
    let Some(&lowest) = best.first() else { return Ok(best) };
    let ids: Vec<u32> = best.iter().map(|&position| id(position)).collect();
    let at: Vec<u32> = best.iter().map(|&position| position as u32).collect();
    let mut probe = Probe::new(lowest as u32, end, 0..decoder.config().layers, Reduce::Max, Reduce::Max)
        .largest_over_layers()
        .row_by_row();
    let pass = Pass { logits: Logits::None, probe: Some(&mut probe), ..Pass::new(&ids, &at, chunks.table) };
    decoder.forward(pages, pass)?;
    let mut total = scores.to_vec();
    for (&position, row) in best.iter().zip(probe.scores().chunks_exact(end)) {
        let chunk = chunks.of(position);
        let own = chunks.starts[chunk]..chunks.starts[chunk + 1];
        for (column, attention) in row.iter().enumerate().skip(first) {
            if !own.contains(&column) {
                total[column] = total[column].max(attention * scores[position]);
            }
        }
    }
    scores.copy_from_slice(&total);
    Ok(best)
}
