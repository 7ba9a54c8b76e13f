//! Canonical KV of sections, one after the other, on pages of their own: who waits for a section while holding pages
//! never waits for pages.

use super::Error;
use super::job::Section;
use super::turns::Tenant;
use cacheclip_model::kv::{ChunkKv, Export};
use cacheclip_model::pages::{Allocator, Sequence, pages_for};
use cacheclip_model::{Collect, Decoder, Device, Logits, Probe, Reduce, Walk};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A section's canonical KV with what ingest learns about its tokens.
#[derive(Clone, Debug)]
pub(crate) struct Canonical {
    /// Position-free KV, anchor stripped.
    pub kv: ChunkKv,
    /// Static rank per token, 255 for the token that the chunk's own later tokens look at most.
    pub rank: Vec<u8>,
}

/// Version of the static rank's algorithm: mean attention a token receives from the rows that see it, over
/// all heads and layers, as ranks.
pub(crate) const RANK_VERSION: u16 = 1;

/// The sections that wait, and the one being encoded.
pub(super) struct Encoder<D: Device> {
    pages: D::Pages,
    sequence: Sequence,
    block_rows: usize,
    waiting: VecDeque<Section>,
    current: Option<Current<D>>,
    /// Positions of the longest section so far, what it is behind included.
    reached: usize,
}

struct Current<D: Device> {
    section: Section,
    walk: Walk<D>,
    export: Export,
    probe: Probe,
    spent: Duration,
}

/// Rows that were computed, and how long that took.
pub(super) type Took = (usize, Duration);

impl<D: Device> Encoder<D> {
    /// For sections of up to `longest` tokens. On the CPU, pages take memory when they are first used.
    ///
    /// # Errors
    /// The device is out of memory.
    pub(super) fn new(decoder: &Decoder<D>, block_rows: usize, longest: usize) -> Result<Self, Error> {
        let allocator = Allocator::new(pages_for(longest));
        let pages = decoder.pages(allocator.total())?;
        let sequence = allocator.sequence(longest)?;
        Ok(Self { pages, sequence, block_rows, waiting: VecDeque::new(), current: None, reached: 0 })
    }

    /// Takes a section in.
    pub(super) fn push(&mut self, section: Section) {
        self.waiting.push_back(section);
    }

    /// Sections that wait or are under way.
    pub(super) fn len(&self) -> usize {
        self.waiting.len() + usize::from(self.current.is_some())
    }

    /// Pages that were written to so far.
    pub(super) fn most_pages(&self) -> usize {
        pages_for(self.reached)
    }

    /// Whose section is next; `None` when there is none. Sections that nobody waits for any more are dropped.
    pub(super) fn tenant(&mut self) -> Option<&Tenant> {
        if self.current.as_ref().is_some_and(|current| current.section.reply.is_closed()) {
            self.current = None;
        }
        if self.current.is_none() {
            self.waiting.retain(|section| !section.reply.is_closed());
        }
        self.current.as_ref().map(|it| &it.section).or(self.waiting.front()).map(|section| &section.tenant)
    }

    /// Takes one block of rows through one layer. Returns the rows, and of a section that is complete what it took.
    pub(super) fn step(&mut self, decoder: &Decoder<D>) -> (usize, Option<Took>) {
        let begun = self.current.take().or_else(|| self.begin(decoder));
        let Some(mut current) = begun else { return (0, None) };
        let (rows, began) = (current.walk.next_rows(), Instant::now());
        let collect = Collect { export: Some(&mut current.export), probe: Some(&mut current.probe) };
        let stepped = decoder.step(&mut self.pages, &mut current.walk, self.sequence.table(), collect);
        current.spent += began.elapsed();
        if let Err(error) = stepped {
            // A caller that went away does not want the answer.
            let _ = current.section.reply.send(Err(error.into()));
            return (rows, None);
        }
        if !current.walk.done() {
            self.current = Some(current);
            return (rows, None);
        }
        (rows, Some(current.finish(decoder)))
    }

    fn begin(&mut self, decoder: &Decoder<D>) -> Option<Current<D>> {
        let section = self.waiting.pop_front()?;
        let all = [&section.behind[..], &section.ids[..]].concat();
        let layers = 0..decoder.config().layers;
        let walk = match decoder.walk(&all, (0..all.len() as u32).collect(), Logits::None, self.block_rows) {
            Ok(walk) => walk,
            Err(error) => {
                // A caller that went away does not want the answer.
                let _ = section.reply.send(Err(error.into()));
                return None;
            }
        };
        self.reached = self.reached.max(all.len());
        Some(Current {
            walk,
            export: Export::default(),
            probe: Probe::new(section.behind.len() as u32, all.len(), layers, Reduce::Mean, Reduce::Mean),
            spent: Duration::ZERO,
            section,
        })
    }
}

impl<D: Device> Current<D> {
    fn finish(self, decoder: &Decoder<D>) -> Took {
        let behind = self.section.behind.len();
        let kv = self.export.finish(behind, decoder.config().head_dim);
        let rank = ranks(&self.probe.scores()[behind..]);
        let _ = self.section.reply.send(Ok(Canonical { kv, rank }));
        (behind + self.section.ids.len(), self.spent)
    }
}

/// Ranks of attention mass as bytes; later tokens are seen by fewer rows, so mass is per row that sees it.
fn ranks(mass: &[f32]) -> Vec<u8> {
    let count = mass.len();
    let seen = |i: usize| mass[i] / (count - i) as f32;
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| seen(b).total_cmp(&seen(a)).then(a.cmp(&b)));
    let mut ranks = vec![0; count];
    for (place, token) in order.into_iter().enumerate() {
        ranks[token] = (255 - place * 255 / count.max(1)) as u8;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_seen_token_ranks_highest_and_every_token_has_a_rank() {
        assert_eq!(ranks(&[0.1, 0.9, 0.2, 0.05]), [64, 255, 192, 128]);
        assert!(ranks(&[]).is_empty());
    }
}
