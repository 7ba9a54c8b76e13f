//! Which store keeps a chunk: rendezvous hashing over the stores' names.
//!
//! Every store has a score for every key, and the highest one keeps it. Nothing is agreed on and nothing is
//! stored: whoever knows the same names places alike. A store that leaves takes only the keys it kept out of
//! place, a store that joins takes only the keys it keeps from now on, each about one share. Replicas will be the
//! next in the order of scores.
//!
//! `score(name, key)` is the first eight bytes, little-endian, of blake3 over the key's 32 bytes, keyed with
//! blake3 in derive-key mode, context `cacheclip.v1 placement`, over the name. It is part of the protocol between
//! clients: two that score differently would miss each other's chunks.

use cacheclip_chunk::ChunkKey;

/// A store's part in placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    name: String,
    seed: [u8; 32],
}

impl Seat {
    /// The seat of the store with this name.
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        let seed = blake3::derive_key("cacheclip.v1 placement", name.as_bytes());
        Self { name, seed }
    }

    /// The store's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How much this store is the one for a key.
    pub fn score(&self, key: &ChunkKey) -> u64 {
        let digest = blake3::keyed_hash(&self.seed, key.as_bytes());
        let (first, _) = digest.as_bytes().split_at(8);
        first.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
    }
}

/// The store that keeps `key`: the one of the highest score, whatever the order of `stores`.
pub fn owner<T>(
    stores: impl IntoIterator<Item = T>,
    seat: impl Fn(&T) -> &Seat,
    key: &ChunkKey,
) -> Option<T> {
    let scored = stores.into_iter().map(|store| (seat(&store).score(key), store));
    // Equal scores are next to impossible; the name decides, so that even then all clients agree.
    let best =
        scored.max_by(|(a, one), (b, other)| a.cmp(b).then_with(|| seat(one).name.cmp(&seat(other).name)));
    best.map(|(_, store)| store)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn seats(names: &BTreeSet<String>) -> Vec<Seat> {
        names.iter().map(Seat::new).collect()
    }

    fn key(n: u64) -> ChunkKey {
        ChunkKey::from_bytes(*blake3::hash(&n.to_le_bytes()).as_bytes())
    }

    fn place<'a>(seats: &'a [Seat], key: &ChunkKey) -> &'a str {
        owner(seats, |seat| seat, key).expect("there is a store").name()
    }

    const KEYS: u64 = 4000;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn a_store_that_joins_or_leaves_moves_only_its_share(
            names in prop::collection::btree_set("[a-z0-9.-]{1,20}", 2..12),
            at in any::<prop::sample::Index>(),
        ) {
            let all = seats(&names);
            let one = all[at.index(all.len())].clone();
            let rest: Vec<Seat> = all.iter().filter(|seat| **seat != one).cloned().collect();
            let mut moved = 0;
            for n in 0..KEYS {
                let (with, without) = (place(&all, &key(n)), place(&rest, &key(n)));
                if with == one.name() {
                    moved += 1;
                } else {
                    prop_assert_eq!(with, without, "a key that the store did not keep stays where it is");
                }
            }
            // Six standard deviations of a fair draw: about one in n, neither none nor all.
            let share = 1.0 / all.len() as f64;
            let spread = 6.0 * (KEYS as f64 * share * (1.0 - share)).sqrt();
            prop_assert!((f64::from(moved) - KEYS as f64 * share).abs() < spread, "{} of {}", moved, KEYS);
        }

        #[test]
        fn the_order_of_the_stores_does_not_matter(
            names in prop::collection::btree_set("[a-z0-9.-]{1,20}", 1..12),
            turn in any::<prop::sample::Index>(),
            n in any::<u64>(),
        ) {
            let all = seats(&names);
            let mut other: Vec<Seat> = all.iter().rev().cloned().collect();
            other.rotate_left(turn.index(all.len()));
            prop_assert_eq!(place(&all, &key(n)), place(&other, &key(n)));
        }
    }

    #[test]
    fn places_are_those_that_were_published() {
        let (one, two) =
            (ChunkKey::from_bytes([7; 32]), ChunkKey::from_bytes(std::array::from_fn(|i| i as u8)));
        // Made by another implementation of blake3 from the sentence above.
        let published = [
            ("store-0", 0xc0e4_b205_e87a_9955, 0xaa33_6941_4374_6184),
            ("store-1", 0xa14f_7a01_6e38_5037, 0x842d_4db9_d1a3_4f90),
            ("store-2", 0x220a_8834_2293_c0d4, 0x13f6_a169_115b_518a_u64),
        ];
        for (name, first, second) in published {
            let seat = Seat::new(name);
            assert_eq!((seat.score(&one), seat.score(&two)), (first, second), "{name}");
        }
        assert_eq!(place(&published.map(|(name, ..)| Seat::new(name)), &one), "store-0");
        assert_eq!(owner::<&Seat>([], |seat| seat, &one), None);
    }
}
