//! The `cacheclip-paper` policy: candidates and window grouping as published (arXiv 2510.10129).
//!
//! The auxiliary tokens with the largest scores, `⌊ratio · tokens⌋` of them over all chunks, name candidate
//! rows by character overlap. A window of eight rows inside one chunk is recomputed if at least five of its
//! rows are candidates; isolated candidates are dropped. The realised ratio is whatever falls out.

use crate::assembly::Assembly;
use crate::overlap::{Scored, scores_of_tokens};
use cacheclip_chunk::ByteSpan;

const WINDOW: usize = 8;
const DENSITY: usize = 5;

/// `spans[c]` are the byte spans of chunk `c`'s rows, `scored[c]` its auxiliary tokens.
pub(crate) fn grouped(
    assembly: &Assembly,
    spans: &[&[ByteSpan]],
    scored: &[Vec<Scored>],
    ratio: f32,
) -> Vec<u32> {
    let tokens: usize = scored.iter().map(Vec::len).sum();
    let keep = (ratio as f64 * tokens as f64).floor() as usize;
    let mut order: Vec<(usize, usize)> = scored
        .iter()
        .enumerate()
        .flat_map(|(chunk, set)| (0..set.len()).map(move |token| (chunk, token)))
        .collect();
    order.sort_by(|a, b| scored[b.0][b.1].score.total_cmp(&scored[a.0][a.1].score).then(a.cmp(b)));
    let mut chosen: Vec<Vec<Scored>> = vec![Vec::new(); scored.len()];
    let mut kept = order[..keep.min(order.len())].to_vec();
    kept.sort_unstable();
    for (chunk, token) in kept {
        chosen[chunk].push(Scored { span: scored[chunk][token].span, score: 1.0 });
    }
    assembly
        .candidates()
        .flat_map(|(index, rows)| {
            let marks = scores_of_tokens(spans[index], &chosen[index]);
            let taken = dense(&marks);
            rows.zip(taken).filter(|(_, taken)| *taken).map(|(row, _)| row as u32)
        })
        .collect()
}

fn dense(marks: &[f32]) -> Vec<bool> {
    let mut taken = vec![false; marks.len()];
    for start in 0..marks.len().saturating_sub(WINDOW - 1) {
        let window = start..start + WINDOW;
        if marks[window.clone()].iter().filter(|&&mark| mark > 0.0).count() >= DENSITY {
            taken[window].fill(true);
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_of_eight_take_the_whole_window_and_four_take_nothing() {
        let marks = |rows: &[usize]| -> Vec<f32> { (0..20).map(|i| f32::from(rows.contains(&i))).collect() };
        assert_eq!(dense(&marks(&[3, 5, 6, 10])).iter().filter(|t| **t).count(), 0);
        let taken = dense(&marks(&[3, 5, 6, 8, 10]));
        assert_eq!(taken.iter().position(|t| *t), Some(3));
        assert_eq!(taken.iter().filter(|t| **t).count(), 8);
    }
}
