//! Markers that tell an index that has lost its records from one that never had any.
//!
//! A marker is a key with a random value that whoever finds it missing sets. It never expires, so another value
//! than last time means that the server was emptied, restarted without its data, or replaced. On a cluster each
//! shard can be lost on its own: there are markers in slots all over the range, so that every shard has some.

/// Slots of a Redis Cluster.
const SLOTS: u16 = 16_384;
/// Markers on a cluster, one in each equal part of the slots: a shard with 512 slots in a row has one.
const MARKERS: u16 = 32;

/// Names of the markers' keys.
pub(super) fn markers(prefix: &str, cluster: bool) -> Vec<String> {
    if !cluster {
        return vec![format!("{prefix}epoch")];
    }
    let mut tags = vec![None; usize::from(MARKERS)];
    let mut missing = MARKERS;
    let mut number = 0u32;
    while missing > 0 {
        let tag = number.to_string();
        let part = &mut tags[usize::from(slot(tag.as_bytes()) / (SLOTS / MARKERS))];
        if part.is_none() {
            *part = Some(tag);
            missing -= 1;
        }
        number += 1;
    }
    // Braces: only the tag decides the slot.
    tags.into_iter().flatten().map(|tag| format!("{prefix}epoch:{{{tag}}}")).collect()
}

/// The slot of a key that is its own hash tag: CRC-16/XMODEM, by the cluster specification.
fn slot(tag: &[u8]) -> u16 {
    let crc =
        tag.iter().fold(0u16, |crc, byte| {
            (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| {
                if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 }
            })
        });
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_cluster_specification() {
        // The specification's own example of the checksum, and slots as CLUSTER KEYSLOT tells them.
        assert_eq!(slot(b"123456789"), 0x31c3);
        assert_eq!(slot(b"foo"), 12_182);
        assert_eq!(slot(b"bar"), 5061);
    }

    #[test]
    fn every_part_of_the_slots_has_its_marker() {
        assert_eq!(markers("a:", false), ["a:epoch"]);
        let markers = markers("a:", true);
        let parts: Vec<_> = markers
            .iter()
            .map(|marker| {
                let (_, tag) = marker.split_once('{').expect("a hash tag");
                slot(tag.trim_end_matches('}').as_bytes()) / 512
            })
            .collect();
        assert_eq!(parts, (0..32).collect::<Vec<_>>());
    }
}
