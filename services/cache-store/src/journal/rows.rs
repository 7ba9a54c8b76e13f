//! How the journal's rows look. Numbers are little-endian, but where their order matters.

use super::{Claim, Receipt, Size};
use cacheclip_chunk::{ChunkKey, LayoutId};

/// Document and key, or key and document.
pub(super) type Pair = [u8; 64];
/// Layout, and when the claim ends.
pub(super) type Held = [u8; 40];
/// Kind (1), time (8, big-endian), and what is due: a pair, or an id and zeros.
pub(super) type Due = [u8; 73];

/// What may become due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Claim = 0,
    Pin = 1,
    Tombstone = 2,
    Deletion = 3,
}

pub(super) const KINDS: [Kind; 4] = [Kind::Claim, Kind::Pin, Kind::Tombstone, Kind::Deletion];

pub(super) fn pair(first: &[u8; 32], second: &[u8; 32]) -> Pair {
    std::array::from_fn(|i| if i < 32 { first[i] } else { second[i - 32] })
}

pub(super) fn swapped(row: &Pair) -> Pair {
    pair(&part(row, 32), &part(row, 0))
}

/// The least and the greatest pair that begin with an id.
pub(super) fn beginning(first: &[u8; 32]) -> (Pair, Pair) {
    (pair(first, &[0; 32]), pair(first, &[0xff; 32]))
}

/// The id at `at`.
pub(super) fn part(row: &[u8], at: usize) -> [u8; 32] {
    std::array::from_fn(|i| row[at + i])
}

pub(super) fn number(row: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| row[at + i]))
}

pub(super) fn pack_held(layout: LayoutId, until: u64) -> Held {
    let mut row = [0; 40];
    row[..32].copy_from_slice(layout.as_bytes());
    row[32..].copy_from_slice(&until.to_le_bytes());
    row
}

pub(super) fn unpack_held(row: &Held) -> (LayoutId, u64) {
    (LayoutId::from_bytes(part(row, 0)), number(row, 32))
}

pub(super) fn due(kind: Kind, at: u64, what: &[u8]) -> Due {
    let mut row = [0; 73];
    row[0] = kind as u8;
    row[1..9].copy_from_slice(&at.to_be_bytes());
    row[9..9 + what.len()].copy_from_slice(what);
    row
}

/// All of a kind that is due at `now`: the least and the greatest row.
pub(super) fn due_by(kind: Kind, now: u64) -> (Due, Due) {
    (due(kind, 0, &[0; 64]), due(kind, now, &[0xff; 64]))
}

/// Generation (8), time (8), objects (4) and bytes (8) on disk, the same in RAM, kept chunks (4), keys (32 each),
/// objects (4) and bytes (8) in the bucket, which a row may lack.
pub(super) fn pack_receipt(receipt: &Receipt, at: u64) -> Vec<u8> {
    let mut row = Vec::with_capacity(FIXED + 32 * receipt.keys.len());
    row.extend(receipt.generation.to_le_bytes());
    row.extend(at.to_le_bytes());
    for size in [receipt.disk, receipt.ram] {
        row.extend(size.objects.to_le_bytes());
        row.extend(size.bytes.to_le_bytes());
    }
    row.extend(receipt.kept.to_le_bytes());
    row.extend(receipt.keys.iter().flat_map(|key| key.as_bytes()));
    row.extend(receipt.bucket.objects.to_le_bytes());
    row.extend(receipt.bucket.bytes.to_le_bytes());
    row
}

const FIXED: usize = 44;
const SIZE: usize = 12;

/// A receipt, and when its document was deleted.
pub(super) fn unpack_receipt(row: &[u8]) -> (Receipt, u64) {
    let short = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| row[at + i]));
    let size = |at: usize| Size { objects: short(at), bytes: number(row, at + 4) };
    let keys = row[FIXED..].chunks_exact(32);
    let has_bucket = keys.remainder().len() == SIZE;
    let receipt = Receipt {
        generation: number(row, 0),
        disk: size(16),
        ram: size(28),
        bucket: if has_bucket { size(row.len() - SIZE) } else { Size::default() },
        kept: short(40),
        keys: keys.map(|key| ChunkKey::from_bytes(part(key, 0))).collect(),
    };
    (receipt, number(row, 8))
}

/// Where a claim is found by its document.
pub(super) fn claim_row(claim: &Claim, key: &ChunkKey) -> Pair {
    pair(claim.document.as_bytes(), key.as_bytes())
}
