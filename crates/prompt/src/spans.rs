//! Byte spans of tokens.
//!
//! What a tokenizer calls offsets is not what we need: a post-processor may trim whitespace off them (holes), and
//! all tokens that share one multi-byte character report that whole character (overlaps). Both functions here give
//! a partition of the text instead.

use cacheclip_chunk::ByteSpan;

/// Exact spans from the number of bytes each token stands for; `None` where they do not add up to the text.
pub(crate) fn exact(lengths: &[usize], text: usize) -> Option<Vec<ByteSpan>> {
    let mut end = 0;
    let mut spans = Vec::with_capacity(lengths.len());
    for length in lengths {
        let start = end;
        end += length;
        spans.push(span(start, end));
    }
    (end == text).then_some(spans)
}

/// Spans from reported offsets: each token reaches to where the next one starts. Of the tokens that share one
/// character, the last gets it, for only then is it complete.
pub(crate) fn from_offsets(offsets: &[(usize, usize)], text: usize) -> Vec<ByteSpan> {
    let mut starts = Vec::with_capacity(offsets.len() + 1);
    let mut floor = 0;
    for (start, _) in offsets {
        floor = floor.max((*start).min(text));
        starts.push(floor);
    }
    // What stands before the first token (a trimmed space) belongs to it.
    if let Some(first) = starts.first_mut() {
        *first = 0;
    }
    starts.push(text);
    starts.windows(2).map(|pair| span(pair[0], pair[1])).collect()
}

/// Callers have checked that the text's length fits.
fn span(start: usize, end: usize) -> ByteSpan {
    let narrow = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
    ByteSpan { start: narrow(start), end: narrow(end) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(spans: &[ByteSpan]) -> Vec<(u32, u32)> {
        spans.iter().map(|span| (span.start, span.end)).collect()
    }

    #[test]
    fn lengths_that_do_not_add_up_are_refused() {
        assert_eq!(exact(&[2, 3], 6), None);
        assert_eq!(pairs(&exact(&[2, 0, 3], 5).expect("a partition")), [(0, 2), (2, 2), (2, 5)]);
    }

    #[test]
    fn trimmed_and_shared_offsets_become_a_partition() {
        // " a b" with trimmed spaces; then a character of four bytes shared by three tokens.
        assert_eq!(pairs(&from_offsets(&[(1, 2), (3, 4)], 4)), [(0, 3), (3, 4)]);
        assert_eq!(
            pairs(&from_offsets(&[(0, 1), (1, 5), (1, 5), (1, 5)], 5)),
            [(0, 1), (1, 1), (1, 1), (1, 5)]
        );
        assert_eq!(pairs(&from_offsets(&[], 0)), []);
    }
}
