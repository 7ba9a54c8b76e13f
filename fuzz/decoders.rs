//! Every decoder of bytes that others wrote, as one function over any bytes: it may refuse them, and must neither panic
//! nor allocate more than they announce. `fuzz_targets/` gives them to libFuzzer, `tests/tests/decoders.rs` runs them
//! over a seeded corpus in the normal suite.
#![allow(dead_code, reason = "a fuzz target uses one of them")]

use bytes::Bytes;
use cacheclip_chunk::container::head::{ALIGN, ENTRY_LEN, HEADER_LEN, MAX_HEAD_LEN};
use cacheclip_chunk::container::{parse_ids, parse_rank, parse_spans};
use cacheclip_chunk::{ChunkKey, Container, Head, LayoutId};
use cacheclip_rpc::v1::kv_frame;

/// Runs a decoder that may hold so many bytes; whoever can measure that does.
pub(crate) type Meter = fn(u64, &mut dyn FnMut());
/// A decoder over any bytes.
pub(crate) type Decoder = fn(&[u8], Meter);

/// Who wrote the containers below.
pub(crate) const LAYOUT: LayoutId = LayoutId::from_bytes([1; 32]);
/// What they hold.
pub(crate) const KEY: ChunkKey = ChunkKey::from_bytes([2; 32]);

/// All of them, by the names of their fuzz targets.
pub(crate) const ALL: [(&str, Decoder); 8] = [
    ("head", head),
    ("container", container),
    ("segment", segment),
    ("contents", contents),
    ("put", put),
    ("frames", frames),
    ("records", records),
    ("options", options),
];

/// What every decoder may hold whatever it is given: a message, a small buffer.
const SMALL: u64 = 4 << 10;
/// Announcing much and bringing little is allowed up to the format's limits; for fuzzing these are too slow.
const MOST_RAW: u64 = 16 << 20;

/// Header and segment table, as they are and with a check that is right.
pub(crate) fn head(data: &[u8], meter: Meter) {
    for data in [data.to_vec(), rechecked(data.to_vec())] {
        let mut parsed = None;
        // The table in memory is a little larger than in bytes.
        meter(SMALL + 4 * data.len() as u64, &mut || parsed = Head::parse(&data).ok());
        let Some(head) = parsed else { continue };
        assert_eq!(Head::len_from_prefix(&data), Ok(head.bytes().len()));
        assert!(head.bytes().len() <= MAX_HEAD_LEN && data.starts_with(head.bytes()));
        let mut end = head.bytes().len() as u64;
        for entry in head.segments() {
            assert!(entry.offset >= end && entry.offset - end < ALIGN);
            assert!(entry.stored_len <= entry.raw_len);
            end = entry.offset + entry.stored_len;
        }
        assert_eq!(end, head.container_len());
    }
}

/// A whole container: all that can be read of it, verified first and not verified.
pub(crate) fn container(data: &[u8], meter: Meter) {
    for data in [data.to_vec(), rechecked(data.to_vec())] {
        let given = data.len() as u64;
        let Ok(container) = Container::parse(Bytes::from(data)) else { continue };
        let head = container.head().clone();
        let largest = head.segments().iter().map(|entry| entry.raw_len).max().unwrap_or_default();
        if largest > MOST_RAW {
            continue;
        }
        // One segment at a time, decoded in two steps, and read into what is asked for.
        let most = SMALL + 4 * largest + given;
        let mut sound = false;
        meter(most, &mut || sound = container.verify_all().is_ok());
        let mut all_read = true;
        meter(most, &mut || {
            all_read = (0..head.shape().layers).all(|layer| container.layer(layer).is_ok());
            all_read &= container.spans().is_ok() && container.rank().is_ok() && container.ids().is_ok();
        });
        assert!(all_read || !sound, "verified, and then not readable");
        assert!(container.layer(head.shape().layers).is_err());
        assert!(container.stored_segment(head.segments().len()).is_err());
    }
}

/// A segment whose digest is right, whatever its bytes: kind, codec, tokens, dtype, then what is stored.
pub(crate) fn segment(data: &[u8], meter: Meter) {
    let Some((&[kind, codec, tokens, dtype], stored)) = data.split_first_chunk() else { return };
    let (kind, codec, tokens) = (u16::from(kind % 4), u16::from(codec % 8), 1 + u32::from(tokens));
    let forged = forge(1 + u16::from(dtype % 3), tokens, kind, codec, stored);
    let Ok(container) = Container::parse(Bytes::from(forged)) else { return };
    let index = usize::from(kind);
    let raw_len = container.head().segments()[index].raw_len;
    let stored = container.stored_segment(index).expect("a segment of the table");
    meter(SMALL + 3 * raw_len, &mut || {
        if let Ok(raw) = container.head().decode_segment(index, &stored) {
            assert_eq!(raw.len() as u64, raw_len);
        }
    });
}

/// Decoded spans, ranks and ids.
pub(crate) fn contents(data: &[u8], meter: Meter) {
    meter(SMALL + 2 * data.len() as u64, &mut || {
        let spans = parse_spans(0, data).unwrap_or_default();
        assert!(spans.iter().all(|span| span.start <= span.end));
        assert_eq!(parse_ids(data).len(), data.len() / 4);
        assert_eq!(parse_rank(0, data.to_vec()).is_ok(), data.len() >= 2);
    });
}

/// What a writer sends to a store, in frames of any size: the first bytes say how it is cut.
pub(crate) fn put(data: &[u8], meter: Meter) {
    let Some((&[cut, whole], container)) = data.split_first_chunk() else { return };
    let bytes = if whole % 2 == 0 { rechecked(container.to_vec()) } else { container.to_vec() };
    let announced = bytes.len() as u64;
    let raw = Head::parse(&bytes)
        .map_or(0, |head| head.segments().iter().map(|entry| entry.raw_len).max().unwrap_or_default());
    if raw > MOST_RAW {
        return;
    }
    let sound = Container::parse(Bytes::from(bytes.clone())).is_ok_and(|container| {
        let head = container.head();
        head.layout() == LAYOUT && head.key() == KEY && container.verify_all().is_ok()
    });
    let frames = bytes.chunks(1 + usize::from(cut) * 16);
    // The frames that wait and one segment, which is decoded in two steps.
    meter(SMALL + 4 * announced + 4 * raw, &mut || {
        let taken = cacheclip_cache_store::fuzz::put(LAYOUT, KEY, announced, frames.clone());
        assert_eq!(taken, sound, "a store takes what is sound and nothing else");
    });
}

/// What a store answers to a client that reads layers, in pieces of a length that the first byte says.
pub(crate) fn frames(data: &[u8], meter: Meter) {
    /// Longest message that is taken.
    const MOST: usize = 1 << 20;
    let Some((&piece, wire)) = data.split_first() else { return };
    let mut came = Vec::new();
    // An empty message takes 5 bytes there, and here a frame.
    meter(SMALL + 100 * wire.len() as u64, &mut || {
        came = cacheclip_rpc::fuzz::frames(wire, 1 + 40 * usize::from(piece), MOST);
    });
    assert_eq!(came, cacheclip_rpc::fuzz::frames(wire, wire.len(), MOST), "however it is cut");
    let raw = came.iter().filter_map(|frame| match &frame.frame {
        Some(kv_frame::Frame::Head(head)) => Head::parse(head).ok(),
        _ => None,
    });
    let largest = raw.flat_map(|head| head.segments().iter().map(|it| it.raw_len).collect::<Vec<_>>()).max();
    let largest = largest.unwrap_or_default();
    if largest <= MOST_RAW {
        meter(SMALL + 4 * largest + 8 * wire.len() as u64, &mut || {
            cacheclip_client::fuzz::frames(LAYOUT, KEY, &came);
        });
    }
}

/// What a store finds in its index.
pub(crate) fn records(data: &[u8], meter: Meter) {
    meter(SMALL + 64 * data.len() as u64, &mut || cacheclip_cache_store::fuzz::records(data));
}

/// A store's configuration file.
pub(crate) fn options(data: &[u8], _: Meter) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = toml::from_str::<cacheclip_cache_store::Options>(text);
    }
}

/// Writes a head's check anew, where there is a head, so that the fields behind it are reached.
pub(crate) fn rechecked(mut data: Vec<u8>) -> Vec<u8> {
    if let Ok(len) = Head::len_from_prefix(&data)
        && len <= data.len()
    {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&data[..112]).update(&data[HEADER_LEN..len]);
        data[112..128].copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    }
    data
}

/// A container of one layer with spans, rank and ids, in which one segment is stored as said; written from the format's
/// description and not by its encoder.
fn forge(dtype: u16, tokens: u32, kind: u16, codec: u16, stored: &[u8]) -> Vec<u8> {
    const SEGMENTS: u16 = 4;
    const HEAD_DIM: u32 = 4;
    let size = if dtype == 1 { 4 } else { 2 };
    let head_len = HEADER_LEN + usize::from(SEGMENTS) * ENTRY_LEN;
    let mut out = vec![0; head_len];
    for segment in 0..SEGMENTS {
        let raw_len = match segment {
            0 => 2 * HEAD_DIM * tokens * size,
            1 => 8 * tokens,
            2 => 2 + tokens,
            _ => 4 * tokens,
        } as usize;
        let (codec, mut content) = match segment == kind {
            true => (codec, stored[..stored.len().min(raw_len)].to_vec()),
            false => (0, vec![0; raw_len]),
        };
        if codec == 0 {
            content.resize(raw_len, 0);
        }
        out.resize(out.len().next_multiple_of(ALIGN as usize), 0);
        let entry = HEADER_LEN + usize::from(segment) * ENTRY_LEN;
        let offset = out.len() as u64;
        out[entry..entry + 2].copy_from_slice(&(segment + 1).to_le_bytes());
        out[entry + 2..entry + 4].copy_from_slice(&codec.to_le_bytes());
        out[entry + 8..entry + 16].copy_from_slice(&offset.to_le_bytes());
        out[entry + 16..entry + 24].copy_from_slice(&(content.len() as u64).to_le_bytes());
        out[entry + 24..entry + 32].copy_from_slice(&(raw_len as u64).to_le_bytes());
        out[entry + 32..entry + 64].copy_from_slice(blake3::hash(&content).as_bytes());
        out.extend_from_slice(&content);
    }
    let len = out.len() as u64;
    out[0..8].copy_from_slice(b"\x89CCKV\r\n\x1a");
    for (at, half) in [(8, 1), (10, HEADER_LEN as u16), (12, ENTRY_LEN as u16), (14, dtype)] {
        out[at..at + 2].copy_from_slice(&half.to_le_bytes());
    }
    let words = [1, SEGMENTS.into(), 1, 1, HEAD_DIM, tokens];
    for (field, word) in out[16..40].chunks_exact_mut(4).zip(words) {
        field.copy_from_slice(&word.to_le_bytes());
    }
    out[40..48].copy_from_slice(&len.to_le_bytes());
    out[48..80].copy_from_slice(LAYOUT.as_bytes());
    out[80..112].copy_from_slice(KEY.as_bytes());
    rechecked(out)
}
