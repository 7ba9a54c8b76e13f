//! Reuse of KV, per family: whole repair equals prefill, no repair does not, and rows see what stands before.

use crate::{
    CONTROL, Expected, FAMILIES, FIXTURES, PAGES, TOLERANCE, decoder, expected, fixture, prefill, tiny,
};
use cacheclip_model::certificate::{certify, relative_error};
use cacheclip_model::config::Config;
use cacheclip_model::kv::{ChunkKv, Export};
use cacheclip_model::load::{Source, load};
use cacheclip_model::pages::Allocator;
use cacheclip_model::{Cpu, Decoder, Logits, Pass};
use std::ops::Range;

/// Tokens at the head of the fixtures' prompts that serve as anchor, and a chunk behind others.
const ANCHOR: usize = 8;
const CHUNK: Range<usize> = 24..72;

/// Position-free KV of `ids` without the first `skip`.
fn kv(decoder: &Decoder<Cpu>, ids: &[u32], skip: usize) -> ChunkKv {
    let allocator = Allocator::new(PAGES);
    let sequence = allocator.sequence(ids.len()).unwrap();
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    let mut export = Export::default();
    let pass = Pass { export: Some(&mut export), ..Pass::new(ids, &positions, sequence.table()) };
    decoder.forward(&mut decoder.pages(PAGES).unwrap(), pass).unwrap();
    export.finish(skip, decoder.config().head_dim)
}

/// KV of the chunk behind the anchor alone, as it is stored.
fn canonical(decoder: &Decoder<Cpu>, ids: &[u32]) -> ChunkKv {
    kv(decoder, &[&ids[..ANCHOR], &ids[CHUNK]].concat(), ANCHOR)
}

/// Error of the prompt's last logits when `stored` is placed at `start` and `computed` rows are computed.
fn error(
    decoder: &Decoder<Cpu>,
    expected: &Expected,
    stored: &ChunkKv,
    start: usize,
    computed: impl Iterator<Item = usize>,
) -> f32 {
    let allocator = Allocator::new(PAGES);
    let sequence = allocator.sequence(expected.ids.len()).unwrap();
    let mut pages = decoder.pages(PAGES).unwrap();
    decoder.place(&mut pages, sequence.table(), stored, start).unwrap();
    let positions: Vec<u32> = computed.map(|row| row as u32).collect();
    let ids: Vec<u32> = positions.iter().map(|&row| expected.ids[row as usize]).collect();
    let pass = Pass::new(&ids, &positions, sequence.table());
    expected.error(&decoder.forward(&mut pages, pass).unwrap())
}

#[test]
fn every_instance_we_ship_proves_itself_at_start() {
    for dir in FIXTURES.map(fixture).into_iter().chain([tiny("primary"), tiny("aux")]) {
        let certificate = certify(&decoder(dir.clone())).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        println!("{}: {certificate}", dir.display());
        assert_eq!(certificate.checks.len(), 5, "{certificate}");
    }
}

/// Random weights stand for shapes whose checkpoints are not at hand; they too must be able to show reuse.
#[test]
fn random_weights_of_every_family_prove_themselves() {
    for name in FAMILIES {
        let config = Config::from_dir(&fixture(name)).unwrap();
        let random = load(&Source::Random { config, seed: 7 }, Cpu).unwrap().decoder;
        let certificate = certify(&random).unwrap_or_else(|e| panic!("{name}: {e}"));
        println!("{name}, random: {certificate}");
    }
}

/// Against the reference implementation's logits, not our own: a chunk's stored KV with all of its rows
/// recomputed, the prompt's head from stored KV, and a chunk's KV taken in context, then rotated anew.
#[test]
fn reuse_with_whole_repair_equals_the_reference_and_reuse_without_misses_by_far() {
    for name in FIXTURES {
        let (ours, expected) = (decoder(fixture(name)), expected(name));
        let (ids, end) = (&expected.ids, expected.ids.len());
        let stored = canonical(&ours, ids);
        let in_context = kv(&ours, &ids[..CHUNK.end], CHUNK.start);
        let head = kv(&ours, &ids[..CHUNK.end], 0);
        let whole = error(&ours, &expected, &stored, CHUNK.start, 0..end);
        let prefix = error(&ours, &expected, &head, 0, CHUNK.end..end);
        let rotated =
            error(&ours, &expected, &in_context, CHUNK.start, (0..CHUNK.start).chain(CHUNK.end..end));
        let stale = error(&ours, &expected, &stored, CHUNK.start, (0..CHUNK.start).chain(CHUNK.end..end));
        println!("{name}: whole {whole:.1e}, prefix {prefix:.1e}, rotated {rotated:.1e}, stale {stale:.1e}");
        assert!(whole < TOLERANCE, "{name}: all rows recomputed, {whole:.1e}");
        assert!(prefix < TOLERANCE, "{name}: prefix hit, {prefix:.1e}");
        assert!(rotated < TOLERANCE, "{name}: rotated when placed, {rotated:.1e}");
        assert!(stale > CONTROL, "{name}: nothing recomputed misses by {stale:.1e} only");
    }
}

#[test]
fn one_pass_by_layers_and_many_passes_one_after_the_other_give_the_same_rows() {
    // More rows than a block of a walk holds, so that a layer has several.
    let source = Source::Dir(tiny("aux"));
    let ours = load(&source, Cpu).unwrap().decoder;
    let count = ours.config().max_positions.min(1500);
    let ids: Vec<u32> = (0..count).map(|i| (i * 31 % ours.config().vocab) as u32).collect();
    let positions: Vec<u32> = (0..count as u32).collect();
    let allocator = Allocator::new(200);
    let (a, b) = (allocator.sequence(count).unwrap(), allocator.sequence(count).unwrap());
    let mut pages = ours.pages(200).unwrap();
    let one = ours.forward(&mut pages, Pass::new(&ids, &positions, a.table())).unwrap();
    let mut many = Vec::new();
    for (ids, positions) in ids.chunks(300).zip(positions.chunks(300)) {
        many = ours.forward(&mut pages, Pass::new(ids, positions, b.table())).unwrap();
    }
    assert!(relative_error(&one, &many) < TOLERANCE);
}

/// One stale hole before a row must change that row: otherwise "exact" would mean nothing.
#[test]
fn one_stale_row_changes_what_stands_behind_it_and_nothing_before() {
    for name in FAMILIES {
        let (ours, ids) = (decoder(fixture(name)), expected(name).ids);
        let (hole, vocab) = (40, ours.config().vocab);
        let exact = prefill(&ours, &ids[..CHUNK.end]);
        let allocator = Allocator::new(PAGES);
        let sequence = allocator.sequence(CHUNK.end).unwrap();
        let mut pages = ours.pages(PAGES).unwrap();
        ours.place(&mut pages, sequence.table(), &canonical(&ours, &ids), CHUNK.start).unwrap();
        let rows: Vec<u32> = (0..CHUNK.end as u32).filter(|&row| row != hole).collect();
        let computed: Vec<u32> = rows.iter().map(|&row| ids[row as usize]).collect();
        let pass = Pass { logits: Logits::All, ..Pass::new(&computed, &rows, sequence.table()) };
        let repaired = ours.forward(&mut pages, pass).unwrap();

        // Logits and not keys: in a model of two layers, no key has seen another row's stale key.
        let mut rounding = 0.0f32;
        for (logits, &row) in repaired.chunks_exact(vocab).zip(&rows) {
            let error = relative_error(logits, &exact[row as usize * vocab..][..vocab]);
            if row < hole {
                assert!(error < TOLERANCE, "{name}: row {row} is before the hole and differs by {error:.1e}");
                rounding = rounding.max(error);
            } else {
                assert!(error > rounding, "{name}: row {row} is behind the hole, unmoved ({error:.1e})");
            }
        }
    }
}
