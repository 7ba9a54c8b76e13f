//! In which pieces a read is made: all at once, or as the request's window lets it.

use std::ops::Range;

/// Layers of neighbouring sections that are asked for together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) layers: Range<usize>,
    pub(super) sections: Range<usize>,
}

/// Cuts `layers` layers of sections, one of which takes `sizes` bytes, into pieces in the order in which they are
/// computed. What does not fit `room` comes in halves of it, so that one is on its way while the other is placed: in
/// whole layers, else in as many sections of a layer as fit, and at least one.
pub(super) fn pieces(layers: usize, sizes: &[u64], room: u64) -> Vec<Piece> {
    let layer: u64 = sizes.iter().sum();
    if layer * layers as u64 <= room {
        return vec![Piece { layers: 0..layers, sections: 0..sizes.len() }];
    }
    let half = room / 2;
    if layer <= half {
        let step = (half / layer) as usize;
        let piece = |from| Piece { layers: from..(from + step).min(layers), sections: 0..sizes.len() };
        return (0..layers).step_by(step).map(piece).collect();
    }
    let groups = groups(sizes, half);
    let of_layer = |layer| groups.iter().map(move |sections| (layer, sections.clone()));
    let piece = |(layer, sections)| Piece { layers: layer..layer + 1, sections };
    (0..layers).flat_map(of_layer).map(piece).collect()
}

/// Neighbours that fit `most` together, or one that does not.
fn groups(sizes: &[u64], most: u64) -> Vec<Range<usize>> {
    let (mut groups, mut from, mut sum) = (Vec::new(), 0, 0);
    for (at, &size) in sizes.iter().enumerate() {
        if at > from && sum + size > most {
            groups.push(from..at);
            (from, sum) = (at, 0);
        }
        sum += size;
    }
    groups.push(from..sizes.len());
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(layers: usize, sizes: &[u64], room: u64) -> Vec<(Range<usize>, Range<usize>)> {
        pieces(layers, sizes, room).into_iter().map(|piece| (piece.layers, piece.sections)).collect()
    }

    #[test]
    fn what_fits_is_one_piece_and_the_rest_comes_in_halves() {
        assert_eq!(cut(4, &[1, 2], 12), [(0..4, 0..2)]);
        assert_eq!(cut(5, &[1, 2], 14), [(0..2, 0..2), (2..4, 0..2), (4..5, 0..2)]);
        assert_eq!(cut(2, &[1, 2], 5), [(0..1, 0..1), (0..1, 1..2), (1..2, 0..1), (1..2, 1..2)]);
        assert_eq!(cut(1, &[3, 3, 9, 1], 13), [(0..1, 0..2), (0..1, 2..3), (0..1, 3..4)]);
    }

    #[test]
    fn every_layer_of_every_section_is_in_one_piece_in_ascending_order() {
        for room in 0..60 {
            let sizes = [2, 5, 1, 3];
            let mut next = [0; 4];
            for piece in pieces(5, &sizes, room) {
                let bytes: u64 = sizes[piece.sections.clone()].iter().sum();
                let bytes = bytes * piece.layers.len() as u64;
                assert!(bytes <= room || piece.sections.len() == 1 && piece.layers.len() == 1);
                for section in piece.sections {
                    assert_eq!(next[section], piece.layers.start);
                    next[section] = piece.layers.end;
                }
            }
            assert_eq!(next, [5; 4], "room for {room}");
        }
    }
}
