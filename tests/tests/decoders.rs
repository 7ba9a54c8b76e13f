//! Bytes that others wrote: the functions that are fuzzed, over a corpus of sound inputs and their mutations that is the
//! same every time. No decoder panics, and none holds more memory than its input announces.

#[path = "../../fuzz/decoders.rs"]
mod decoders;
#[path = "../../services/cache-store/tests/common/dice.rs"]
mod dice;

use bytes::Bytes;
use cacheclip_chunk::container::encode::encode_with_ids;
use cacheclip_chunk::{ByteSpan, Codec, Dtype, Head, KvShape, Parts, Rank};
use cacheclip_rpc::v1::{KvFrame, MissReason, Segment, Tier, kv_frame};
use decoders::{ALL, KEY, LAYOUT, Meter};
use dice::Dice;
use prost::Message as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Mutations per decoder.
const CASES: u64 = 4000;

const METER: Meter = |limit, decode| {
    let held = allocation_counter::measure(decode).bytes_max;
    assert!(held <= limit, "{held} bytes are held, {limit} are announced");
};

/// Sound containers of every codec, dtype and kind of segment.
fn containers() -> Vec<Vec<u8>> {
    let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 8 };
    let codecs = [Codec::Raw, Codec::default(), Codec::BytePlaneZstd { level: 3 }];
    let kinds =
        [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().flat_map(|it| codecs.map(|codec| (it, codec)));
    let container = |(dtype, codec): (Dtype, Codec)| {
        let tokens = 40;
        let layer: Vec<u8> = (0..shape.layer_bytes(tokens, dtype)).map(|at| (at % 8) as u8).collect();
        let spans: Vec<_> = (0..tokens).map(|at| ByteSpan { start: 3 * at, end: 3 * at + 2 }).collect();
        let ids: Vec<u32> = (0..tokens).collect();
        let parts = Parts {
            layout: LAYOUT,
            key: KEY,
            shape,
            tokens,
            dtype,
            layers: vec![&layer; 2],
            spans: Some(&spans),
            rank: Some(Rank { version: 1, ranks: &[7; 40] }),
        };
        encode_with_ids(&parts, &ids, codec).expect("a container")
    };
    kinds.map(container).collect()
}

/// What a store answers with a container, in pieces of 400 bytes, in frames of which segments take two.
fn answer(container: &[u8]) -> Vec<u8> {
    let head = Head::parse(container).expect("a container");
    let frame = |frame, tier: Tier| KvFrame { frame: Some(frame), tier: tier.into(), ..KvFrame::default() };
    let mut frames = vec![frame(kv_frame::Frame::Head(head.bytes().clone()), Tier::StoreDisk)];
    // Spans, rank and ids first, as stores send them.
    let order = (2..head.segments().len()).chain(0..2);
    for index in order {
        let entry = &head.segments()[index];
        let stored = &container[entry.offset as usize..(entry.offset + entry.stored_len) as usize];
        let half = stored.len() / 2;
        for (offset, data) in [(0, &stored[..half]), (half, &stored[half..])] {
            let data = Bytes::copy_from_slice(data);
            let segment = Segment { index: index as u32, offset: offset as u64, data };
            frames.push(frame(kv_frame::Frame::Segment(segment), Tier::Unspecified));
        }
    }
    frames.push(frame(kv_frame::Frame::Missing(MissReason::Evicted.into()), Tier::Unspecified));
    // What gRPC writes before a message: that it is not compressed, and its length.
    let message = |frame: &KvFrame| {
        let message = frame.encode_to_vec();
        [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat()
    };
    [10].into_iter().chain(frames.iter().flat_map(message)).collect()
}

/// Sound inputs of a decoder.
fn seeds(decoder: &str) -> Vec<Vec<u8>> {
    let containers = containers();
    let with = |prefix: &[u8], rest: &[u8]| [prefix, rest].concat();
    match decoder {
        "segment" => {
            let stored = |(at, container): (usize, &Vec<u8>)| {
                let head = Head::parse(container).expect("a container");
                let stored = head.segments().iter().enumerate().map(move |(index, entry)| {
                    let kind = index.saturating_sub(1) as u8;
                    let prefix = [kind, entry.codec as u16 as u8, 39, (at / 3) as u8];
                    let range = entry.offset as usize..(entry.offset + entry.stored_len) as usize;
                    [&prefix[..], &container[range]].concat()
                });
                stored.collect::<Vec<_>>()
            };
            containers.iter().enumerate().flat_map(stored).collect()
        }
        "put" => containers.iter().map(|it| with(&[60, 1], it)).collect(),
        "frames" => containers.iter().map(|it| answer(it)).collect(),
        "records" => {
            let lease = b"00000000000000ff http://a:1".to_vec();
            vec![vec![7; 80], lease, (0..=255).collect()]
        }
        "options" => vec![
            b"node = \"a\"\ndata_dir = \"/data\"\ndisk_bytes = 1000\n[index]\nkind = \"redis\"\nurls = [\"redis://a\"]"
                .to_vec(),
        ],
        "contents" => vec![vec![0; 320], (0..=255).collect(), vec![1, 0, 5, 5, 5]],
        _ => containers,
    }
}

/// One to four small or large changes.
fn mutated(seeds: &[Vec<u8>], dice: &mut Dice) -> Vec<u8> {
    let mut below = |end: usize| dice.below(end as u64) as usize;
    let mut bytes = seeds[below(seeds.len())].clone();
    for _ in 0..=below(4) {
        // Heads and tables are small: half of the changes aim at them.
        let end = if below(2) == 0 { bytes.len() } else { bytes.len().min(500) };
        let at = below(end);
        match below(8) {
            0 => bytes.truncate(at),
            1 => bytes.extend(std::iter::repeat_n(below(256) as u8, below(300))),
            2 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][below(5)],
            3 if at + 8 <= bytes.len() => {
                let word = [0, 1, u64::MAX, 1 << 31, 1 << 32, 1 << 63, 4096][below(7)];
                bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(word));
            }
            4 => {
                let other = &seeds[below(seeds.len())];
                let from = below(other.len());
                let len = below(100).min(other.len() - from).min(bytes.len().saturating_sub(at));
                bytes[at..at + len].copy_from_slice(&other[from..from + len]);
            }
            5 => drop(bytes.drain(at..(at + below(64)).min(bytes.len()))),
            _ if at < bytes.len() => bytes[at] ^= 1 << below(8),
            _ => {}
        }
    }
    bytes
}

fn run(name: &str, decoder: decoders::Decoder, case: &str, bytes: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| decoder(bytes, METER))).is_err() {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        panic!("{name} fails with {case}: {hex}");
    }
}

#[test]
fn no_decoder_panics_or_holds_more_than_its_input_announces() {
    for (name, decoder) in ALL {
        let seeds = seeds(name);
        for (at, seed) in seeds.iter().enumerate() {
            run(name, decoder, &format!("seed {at}"), seed);
        }
        for case in 0..CASES {
            let bytes = mutated(&seeds, &mut Dice(case));
            run(name, decoder, &format!("mutation {case}"), &bytes);
        }
    }
}

#[test]
fn every_decoder_has_a_fuzz_target() {
    let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let manifest: toml::Table =
        std::fs::read_to_string(fuzz.join("Cargo.toml")).expect("fuzz/Cargo.toml").parse().expect("TOML");
    let targets = manifest["bin"].as_array().expect("targets");
    let targets: Vec<&str> = targets.iter().filter_map(|target| target["name"].as_str()).collect();
    assert_eq!(targets, ALL.map(|(name, _)| name));
    for name in targets {
        let target = std::fs::read_to_string(fuzz.join(format!("fuzz_targets/{name}.rs"))).expect(name);
        assert!(target.contains(&format!("decoders::{name}(")), "{name} fuzzes something else");
    }
}
