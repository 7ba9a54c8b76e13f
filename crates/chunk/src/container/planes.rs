//! Byte planes: all first bytes of the elements, then all second bytes, and so on.
//!
//! Exponents of neighbours are alike and mantissas are not: side by side each is what a compressor can work with.
//! Elements of 2 and 4 bytes, which KV has, go through one pass that compilers turn into vector instructions.

/// Takes elements of `size` bytes apart: element `i`'s byte `p` goes to `p * elements + i`. Bytes behind the last whole
/// element become zeros.
pub fn split(raw: &[u8], size: usize) -> Vec<u8> {
    match size {
        1 => raw.to_vec(),
        2 => split_pairs(raw),
        4 => split_fours(raw),
        _ => split_any(raw, size),
    }
}

/// Undoes [`split`].
pub fn join(planes: &[u8], size: usize) -> Vec<u8> {
    match size {
        1 => planes.to_vec(),
        2 => join_pairs(planes),
        4 => join_fours(planes),
        _ => join_any(planes, size),
    }
}

fn split_pairs(raw: &[u8]) -> Vec<u8> {
    let (pairs, _) = raw.as_chunks::<2>();
    let mut planes = vec![0; raw.len()];
    let (low, high) = planes.split_at_mut(pairs.len());
    for ((pair, low), high) in pairs.iter().zip(low).zip(high) {
        let element = u16::from_le_bytes(*pair);
        (*low, *high) = (element as u8, (element >> 8) as u8);
    }
    planes
}

fn join_pairs(planes: &[u8]) -> Vec<u8> {
    let (low, high) = planes.split_at(planes.len() / 2);
    let pairs = low.iter().zip(high).map(|(low, high)| [*low, *high]);
    filled(pairs.collect(), planes.len())
}

fn split_fours(raw: &[u8]) -> Vec<u8> {
    let (fours, _) = raw.as_chunks::<4>();
    let mut planes = vec![0; raw.len()];
    let (low, high) = planes.split_at_mut(2 * fours.len());
    let ((a, b), (c, d)) = (low.split_at_mut(fours.len()), high.split_at_mut(fours.len()));
    for ((((four, a), b), c), d) in fours.iter().zip(a).zip(b).zip(c).zip(d) {
        let element = u32::from_le_bytes(*four);
        (*a, *b, *c, *d) =
            (element as u8, (element >> 8) as u8, (element >> 16) as u8, (element >> 24) as u8);
    }
    planes
}

fn join_fours(planes: &[u8]) -> Vec<u8> {
    let elements = planes.len() / 4;
    let (low, high) = planes.split_at(2 * elements);
    let ((a, b), (c, d)) = (low.split_at(elements), high.split_at(elements));
    let fours = a.iter().zip(b).zip(c).zip(d).map(|(((a, b), c), d)| [*a, *b, *c, *d]);
    filled(fours.collect(), planes.len())
}

/// Elements as bytes, with zeros behind the last whole one.
fn filled<const N: usize>(elements: Vec<[u8; N]>, length: usize) -> Vec<u8> {
    let mut raw = elements.into_flattened();
    raw.resize(length, 0);
    raw
}

fn split_any(raw: &[u8], size: usize) -> Vec<u8> {
    let elements = raw.len() / size;
    let mut planes = vec![0; raw.len()];
    for (plane, out) in planes.chunks_exact_mut(elements.max(1)).take(size).enumerate() {
        for (byte, element) in out.iter_mut().zip(raw.chunks_exact(size)) {
            *byte = element[plane];
        }
    }
    planes
}

fn join_any(planes: &[u8], size: usize) -> Vec<u8> {
    let elements = planes.len() / size;
    let mut raw = vec![0; planes.len()];
    for (plane, bytes) in planes.chunks_exact(elements.max(1)).take(size).enumerate() {
        for (element, byte) in raw.chunks_exact_mut(size).zip(bytes) {
            element[plane] = *byte;
        }
    }
    raw
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn planes_are_where_the_format_says() {
        assert_eq!(split(&[1, 2, 3, 4, 5, 6], 2), [1, 3, 5, 2, 4, 6]);
        assert_eq!(split(&[1, 2, 3, 4, 5, 6, 7, 8], 4), [1, 5, 2, 6, 3, 7, 4, 8]);
        assert_eq!(split(&[1, 2, 3, 4, 5, 6], 3), [1, 4, 2, 5, 3, 6]);
        assert_eq!(split(&[], 4), [0u8; 0]);
    }

    #[test]
    fn bytes_behind_the_last_whole_element_become_zeros() {
        for (size, planes) in [(2, &[1, 3, 2, 4, 0][..]), (4, &[1, 2, 3, 4, 0])] {
            assert_eq!(split(&[1, 2, 3, 4, 5], size), planes);
            assert_eq!(join(planes, size), [1, 2, 3, 4, 0]);
        }
    }

    proptest! {
        #[test]
        fn the_fast_ways_are_the_plain_one(raw in proptest::collection::vec(any::<u8>(), 0..300), size in 1usize..6) {
            // Segments hold whole elements.
            let raw = &raw[..raw.len() / size * size];
            let planes = split(raw, size);
            prop_assert_eq!(&planes, &split_any(raw, size));
            prop_assert_eq!(join(&planes, size), raw);
            prop_assert_eq!(join_any(&planes, size), raw);
        }
    }
}
