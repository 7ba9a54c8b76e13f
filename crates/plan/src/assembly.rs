//! The rows of an assembled prompt and what is known about each before anything is recomputed.

use std::ops::Range;

/// A prompt as `prefix ‖ chunk_1 … chunk_n ‖ question`, in rows (one row per token).
///
/// Chunk KV is canonical: computed behind the anchor alone. It equals full prefill only where nothing but
/// the anchor stands before the chunk here too, that is, for the first chunk behind a prefix that is the
/// anchor. Everything else reused is stale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assembly {
    prefix: usize,
    ends: Vec<usize>,
    total: usize,
    exact_chunks: usize,
}

/// Rows by how they compare with full prefill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Equal to full prefill.
    pub exact: usize,
    /// Recomputed against a cache that is partly stale.
    pub repaired: usize,
    /// Never saw what stands before them here.
    pub stale: usize,
}

impl Assembly {
    /// Lengths in rows; `prefix_is_anchor` says whether the request's prefix is the anchor, token by token.
    pub fn new(prefix: usize, chunks: &[usize], question: usize, prefix_is_anchor: bool) -> Self {
        let mut end = prefix;
        let ends: Vec<usize> = chunks
            .iter()
            .map(|len| {
                end += len;
                end
            })
            .collect();
        let exact_chunks = usize::from(prefix_is_anchor && !chunks.is_empty());
        Self { prefix, total: end + question, ends, exact_chunks }
    }

    /// Rows of the prefix; always exact.
    pub fn prefix(&self) -> Range<usize> {
        0..self.prefix
    }

    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.ends.len()
    }

    /// Rows of one chunk.
    pub fn chunk(&self, index: usize) -> Range<usize> {
        let start = if index == 0 { self.prefix } else { self.ends[index - 1] };
        start..self.ends[index]
    }

    /// Rows of all chunks: what is reused.
    pub fn reused(&self) -> Range<usize> {
        self.prefix..self.ends.last().copied().unwrap_or(self.prefix)
    }

    /// Rows of the question; always computed.
    pub fn question(&self) -> Range<usize> {
        self.reused().end..self.total
    }

    /// Rows of the whole prompt.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Whether this chunk's canonical KV already equals full prefill here.
    pub fn is_exact(&self, chunk: usize) -> bool {
        chunk < self.exact_chunks
    }

    /// Chunks whose rows may be selected, with their rows: exact rows never are candidates.
    pub fn candidates(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        (self.exact_chunks..self.chunks()).map(|index| (index, self.chunk(index)))
    }

    /// Rows that could be selected.
    pub fn candidate_rows(&self) -> usize {
        self.candidates().map(|(_, rows)| rows.len()).sum()
    }

    /// How the chunk rows stand after `selected` (ascending) were recomputed in one pass: a recomputed row
    /// is exact as long as no stale row stands before it.
    pub fn counts(&self, selected: &[u32]) -> Counts {
        let first = self.exact_chunks;
        let exact_rows = if first == 0 { 0 } else { self.chunk(first - 1).end - self.prefix };
        let mut counts = Counts { exact: exact_rows, ..Counts::default() };
        let mut chosen = selected.iter().peekable();
        for (_, rows) in self.candidates() {
            for row in rows {
                if chosen.next_if(|&&next| next as usize == row).is_none() {
                    counts.stale += 1;
                } else if counts.stale == 0 {
                    counts.exact += 1;
                } else {
                    counts.repaired += 1;
                }
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_chunk_behind_the_anchor_is_exact_and_never_a_candidate() {
        let assembly = Assembly::new(4, &[10, 6], 3, true);
        assert_eq!(assembly.candidates().collect::<Vec<_>>(), [(1, 14..20)]);
        assert_eq!(assembly.question(), 20..23);
        assert_eq!(Assembly::new(4, &[10, 6], 3, false).candidate_rows(), 16);
    }

    #[test]
    fn one_stale_row_makes_everything_behind_it_repaired_at_best() {
        let assembly = Assembly::new(4, &[10, 6, 2], 3, true);
        let all_but_one: Vec<u32> = (14..22).filter(|&row| row != 16).collect();
        assert_eq!(assembly.counts(&all_but_one), Counts { exact: 12, repaired: 5, stale: 1 });
        let all: Vec<u32> = (14..22).collect();
        assert_eq!(assembly.counts(&all), Counts { exact: 18, repaired: 0, stale: 0 });
    }

    #[test]
    fn no_chunks_is_an_ordinary_prompt() {
        let assembly = Assembly::new(4, &[], 3, true);
        assert_eq!((assembly.reused(), assembly.candidate_rows(), assembly.total()), (4..4, 0, 7));
    }
}
