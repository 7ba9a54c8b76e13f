//! Reuse with copies and placement beside computation, and in one stream with it, in turns; and when each piece was done.

use crate::bed::{Bed, Piece, Room, Timed as _};
use crate::model::Model;
use crate::scorer::Scorer;
use crate::work::Work;
use cacheclip_bench::runs::Runs;
use serde::Serialize;
use std::cell::RefCell;

/// Share of the reused rows that is recomputed.
const RATIO: f32 = 0.2;

#[derive(Debug, Serialize)]
struct Row {
    row: &'static str,
    shape: &'static str,
    tokens: usize,
    ratio: f32,
    on_seconds: Runs,
    off_seconds: Runs,
    /// Off over on, round by round.
    gain: Runs,
    /// Share of the time of placing, copies included, that lies within that of computing.
    beside: Option<f64>,
    /// Of one prompt with overlap.
    timeline: Vec<Piece>,
}

/// Times both, in turns.
///
/// # Errors
/// No device, or no room for two models; a device fault.
pub fn run<B: Bed>(bed: &B, work: &Work, name: &'static str) -> anyhow::Result<()> {
    let (scale, shape) = (work.scale, work.scale.shape(name)?);
    let tokens = scale.prompt(scale.telling);
    let room = Room::of(&shape, &[tokens], scale.telling, scale.block_rows);
    let mut on = Model::random(bed, &shape, tokens, room)?;
    let count = scale.telling / scale.chunk;
    let prompt = on.prompt(count, scale.chunk, scale.question)?;
    let mut off = Model::random(bed, &shape, tokens, Room { overlap: false, host_bytes: 0, ..room })?;
    let scorer = Scorer::new(&scale.shape("aux-30m")?, &work.models.join("aux"), count, scale.chunk)?;
    let choose = || scorer.choose(&prompt.assembly, RATIO);
    let seconds = RefCell::new((Vec::new(), Vec::new()));
    work.rounds(
        scale.rounds,
        || {
            let with = on.reuse(&prompt, choose)?.1.all;
            let without = off.reuse(&prompt, choose)?.1.all;
            let mut seconds = seconds.borrow_mut();
            seconds.0.push(with);
            seconds.1.push(without);
            Ok(())
        },
        || *seconds.borrow_mut() = Default::default(),
    )?;
    on.decoder().device().trace()?;
    on.reuse(&prompt, choose)?;
    let timeline = on.decoder().device().timeline()?;
    let (with, without) = seconds.into_inner();
    let row = Row {
        row: "overlap",
        shape: name,
        tokens: scale.telling,
        ratio: RATIO,
        gain: Runs::of(without.iter().zip(&with).map(|(off, on)| off / on).collect()),
        on_seconds: Runs::of(with),
        off_seconds: Runs::of(without),
        beside: beside(&timeline),
        timeline,
    };
    let (with, without) = (row.on_seconds.map(|it| it * 1e3), row.off_seconds.map(|it| it * 1e3));
    work.say(format_args!(
        "overlap: {} ms with, {} ms without; {:.0} % of placing beside computing",
        with.text(1),
        without.text(1),
        row.beside.unwrap_or(f64::NAN) * 100.0
    ));
    work.row(&row)
}

/// Share of the milliseconds of placing, copies included, between the beginning of the first computation and the end of
/// the last. What a layer waits for placing there is not told apart from computing: off over on says what it costs.
fn beside(timeline: &[Piece]) -> Option<f64> {
    let (placing, computing): (Vec<&Piece>, Vec<&Piece>) = timeline.iter().partition(|it| it.what == "place");
    let first = computing.iter().map(|it| it.start).reduce(f32::min)?;
    let last = computing.iter().map(|it| it.end).reduce(f32::max)?;
    let all: f32 = placing.iter().map(|it| it.end - it.start).sum();
    let within: f32 = placing.iter().map(|it| (it.end.min(last) - it.start.max(first)).max(0.0)).sum();
    (all > 0.0).then(|| f64::from(within / all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_placed_before_anything_is_computed_is_not_beside_it() {
        let piece = |what: &str, start, end| Piece { what: what.into(), layer: 0, start, end };
        let timeline = [
            piece("place", 0.0, 2.0),
            piece("place", 1.0, 3.0),
            piece("scatter", 2.0, 4.0),
            piece("attend", 4.5, 5.5),
            piece("place", 5.0, 7.0),
        ];
        // Of two milliseconds of placing each: none, one and half a one.
        assert_eq!(beside(&timeline), Some(0.25));
        assert_eq!(beside(&timeline[2..4]), None);
        assert_eq!(beside(&timeline[..2]), None);
    }
}
