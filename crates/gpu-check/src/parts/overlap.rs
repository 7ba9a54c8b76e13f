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
    /// Scoring included: what is placed meanwhile is hidden behind that, with or without a second stream.
    scored: Sides,
    /// With rows that are known: nothing but computing is there to hide behind.
    known: Sides,
    /// Share of the time of placing, copies included, that lies within that of computing.
    beside: Option<f64>,
    /// Of one prompt with overlap, and rows that are known.
    timeline: Vec<Piece>,
}

/// With a second stream, and without.
#[derive(Debug, Serialize)]
struct Sides {
    on_seconds: Runs,
    off_seconds: Runs,
    /// Off over on, round by round.
    gain: Runs,
}

impl Sides {
    fn of((on, off): (Vec<f64>, Vec<f64>)) -> Self {
        let gain = Runs::of(off.iter().zip(&on).map(|(off, on)| off / on).collect());
        Self { on_seconds: Runs::of(on), off_seconds: Runs::of(off), gain }
    }
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
    let mut off = Model::random(bed, &shape, tokens, Room { overlap: false, ..room })?;
    let scorer = Scorer::new(&scale.shape("aux-30m")?, &work.models.join("aux"), count, scale.chunk)?;
    let choose = || scorer.choose(&prompt.assembly, RATIO);
    let rows = choose()?;
    let known = || Ok(rows.clone());
    let seconds = RefCell::new([(Vec::new(), Vec::new()), (Vec::new(), Vec::new())]);
    work.rounds(
        scale.rounds,
        || {
            let [scored, ready] = &mut *seconds.borrow_mut();
            scored.0.push(on.reuse(&prompt, choose)?.1.all);
            scored.1.push(off.reuse(&prompt, choose)?.1.all);
            ready.0.push(on.reuse(&prompt, known)?.1.all);
            ready.1.push(off.reuse(&prompt, known)?.1.all);
            Ok(())
        },
        || *seconds.borrow_mut() = Default::default(),
    )?;
    on.decoder().device().trace()?;
    on.reuse(&prompt, known)?;
    let timeline = on.decoder().device().timeline()?;
    let [scored, known] = seconds.into_inner().map(Sides::of);
    let row = Row {
        row: "overlap",
        shape: name,
        tokens: scale.telling,
        ratio: RATIO,
        scored,
        known,
        beside: beside(&timeline),
        timeline,
    };
    for (what, sides) in [("scored", &row.scored), ("known rows", &row.known)] {
        let (on, off) = (sides.on_seconds.map(|it| it * 1e3), sides.off_seconds.map(|it| it * 1e3));
        work.say(format_args!("overlap, {what}: {} ms with, {} ms without", on.text(1), off.text(1)));
    }
    let beside = row.beside.unwrap_or(f64::NAN) * 100.0;
    work.say(format_args!("{beside:.0} % of placing beside computing"));
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
