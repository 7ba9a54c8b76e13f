//! Promises of the engine, on a small model with random weights.

use super::*;
use crate::budget::{Budget, Window};
use crate::incoming::{Incoming, Kv, Layer};
use cacheclip_model::Cpu;
use cacheclip_model::config::Config;
use cacheclip_model::kv::ChunkKv;
use cacheclip_model::load::{Source, load};
use cacheclip_plan::{Assembly, Policy, Rung};
use std::time::Instant;

const PAGES: usize = 96;
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

fn decoder() -> Decoder<Cpu> {
    let config = Config::shape("aux-30m").unwrap();
    let config =
        Config { layers: 3, vocab: 400, hidden: 128, intermediate: 256, heads: 2, kv_heads: 1, ..config };
    load(&Source::Random { config, seed: 5 }, Cpu).unwrap().decoder
}

fn tokenizer() -> Tokenizer {
    let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/primary");
    Tokenizer::from_dir(&models).unwrap()
}

fn engine(pages: usize) -> Engine {
    let options = Options { pages, longest: 1024, queue: 8, prefill_rows: 16, shadow_ratio: 0.0 };
    Engine::start(decoder(), tokenizer(), options).unwrap()
}

fn ids(count: usize, salt: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 7 + salt) % 400).collect()
}

/// A prompt without chunks, computed in context.
fn plain(prompt: usize, answer: usize, tenant: &str) -> Generation {
    Generation {
        ids: ids(prompt, 1),
        assembly: Assembly::new(prompt - 4, &[], 4, false),
        tenant: tenant.as_bytes().into(),
        placed: Vec::new(),
        policy: Policy::Full,
        ratio: None,
        scored: None,
        spans: Vec::new(),
        rank: None,
        fuse_rank: false,
        probe: false,
        rung: Rung::None,
        sampling: Default::default(),
        max_tokens: answer,
        stop: Vec::new(),
        eos: Vec::new(),
        received: Instant::now(),
        queued: Instant::now(),
    }
}

/// A prefix of 8 tokens and one chunk whose KV is reused as it is.
fn stale(prefix: ChunkKv, chunk: ChunkKv) -> Generation {
    let tokens = chunk.tokens();
    reuse(Kv::Here(prefix), tokens, Kv::Here(chunk))
}

/// The same, of KV that may be on its way.
fn reuse(prefix: Kv, tokens: usize, chunk: Kv) -> Generation {
    let start = 8;
    let total = start + tokens + 4;
    Generation {
        ids: ids(total, 1),
        assembly: Assembly::new(start, &[tokens], 4, false),
        placed: vec![Placed { starts: vec![0], kv: prefix }, Placed { starts: vec![start], kv: chunk }],
        policy: Policy::Stale,
        spans: vec![vec![cacheclip_chunk::ByteSpan { start: 0, end: 0 }; tokens]],
        ..plain(total, 3, "reuse")
    }
}

fn start(engine: &Engine, generation: Generation) -> Events {
    engine.generate(generation, engine.owe(1)).unwrap()
}

async fn next(events: &mut Events) -> Option<Event> {
    tokio::time::timeout(DEADLINE, events.recv()).await.expect("the engine answers")
}

async fn finish(mut events: Events) -> Box<Outcome> {
    loop {
        match next(&mut events).await {
            Some(Event::Done(outcome)) => return outcome,
            Some(Event::Text(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

async fn section(engine: &Engine, tokens: usize, salt: u32) -> ChunkKv {
    let canonical = engine.canonical(Arc::from([]), ids(tokens, salt), Tenant::default(), engine.owe(tokens));
    tokio::time::timeout(DEADLINE, canonical).await.expect("the engine answers").unwrap().kv
}

/// Room for all of this KV.
async fn window(kv: &ChunkKv) -> Window {
    let bytes = kv.bytes() as u64;
    Budget::new(bytes, 1).open(bytes).await.unwrap()
}

/// Its layers come.
fn arrive(engine: &Engine, coming: &Incoming, kv: &ChunkKv, window: &Window) {
    for share in kv.shares() {
        let size = share.bytes() as u64;
        coming.arrive(Layer::new(share, window.try_grant(size).unwrap()));
        engine.wake();
    }
}

#[tokio::test]
async fn layers_that_come_one_by_one_give_the_answer_of_layers_that_were_there() {
    let engine = engine(PAGES);
    let (prefix, chunk) = (section(&engine, 8, 1).await, section(&engine, 40, 9).await);
    let want = finish(start(&engine, stale(prefix.clone(), chunk.clone()))).await;
    let coming = Incoming::default();
    let events = start(&engine, reuse(Kv::Here(prefix), 40, Kv::Coming(coming.clone())));
    arrive(&engine, &coming, &chunk, &window(&chunk).await);
    assert_eq!(finish(events).await.text, want.text);
}

#[tokio::test]
async fn kv_that_has_come_makes_room_while_other_kv_is_awaited() {
    let engine = engine(PAGES);
    let (prefix, chunk) = (section(&engine, 8, 1).await, section(&engine, 40, 9).await);
    let want = finish(start(&engine, stale(prefix.clone(), chunk.clone()))).await;
    let (first, second) = (Incoming::default(), Incoming::default());
    let both = reuse(Kv::Coming(first.clone()), 40, Kv::Coming(second.clone()));
    let events = start(&engine, both);
    let room = window(&chunk).await;
    arrive(&engine, &second, &chunk, &room);
    let placed = room.grant(chunk.bytes() as u64);
    drop(tokio::time::timeout(DEADLINE, placed).await.expect("nothing of it is held when it is placed"));
    arrive(&engine, &first, &prefix, &window(&prefix).await);
    assert_eq!(finish(events).await.text, want.text);
}

#[tokio::test]
async fn who_waits_for_kv_keeps_nobody_else_waiting() {
    let engine = engine(PAGES);
    let (prefix, chunk) = (section(&engine, 8, 1).await, section(&engine, 40, 9).await);
    let coming = Incoming::default();
    let mut waits = start(&engine, reuse(Kv::Here(prefix), 40, Kv::Coming(coming.clone())));
    finish(start(&engine, plain(50, 5, "other"))).await;
    // Sections are encoded on pages of their own.
    section(&engine, 30, 4).await;
    assert!(waits.inbox.try_recv().is_err(), "its KV has not come");
    arrive(&engine, &coming, &chunk, &window(&chunk).await);
    finish(waits).await;
}

#[tokio::test]
async fn sections_are_encoded_while_prompts_that_wait_for_them_hold_all_pages() {
    let engine = engine(PAGES);
    let prefix = section(&engine, 8, 1).await;
    let total = PAGES * 16 - 3;
    let coming = Incoming::default();
    let awaits = reuse(Kv::Here(prefix), 40, Kv::Coming(coming.clone()));
    let all = Generation { max_tokens: total - 52, ..awaits };
    let events = start(&engine, Generation { eos: (0..400).collect(), ..all });
    let encoded = section(&engine, 40, 9).await;
    arrive(&engine, &coming, &encoded, &window(&encoded).await);
    assert_eq!(finish(events).await.tokens, 1);
}

#[tokio::test]
async fn a_long_prompt_that_joins_does_not_stall_running_answers() {
    let engine = engine(PAGES);
    let mut running = start(&engine, plain(20, 600, "running"));
    next(&mut running).await;
    let mut joins = start(&engine, plain(600, 2, "joins"));
    let before = running.inbox.len();
    next(&mut joins).await;
    // 600 rows in blocks of 64 through 3 layers: 30 steps with a token behind each; some tokens make no text yet.
    let between = running.inbox.len() - before;
    assert!(between >= 5, "{between} pieces of text while 600 rows were computed");
}

#[tokio::test]
async fn pages_of_who_goes_away_are_free_for_the_next_even_while_nothing_else_happens() {
    let engine = engine(PAGES);
    let prefix = section(&engine, 8, 1).await;
    let most = PAGES * 16 - 52;
    // Waits for KV that will never come, with all pages.
    let awaits = reuse(Kv::Here(prefix), 40, Kv::Coming(Incoming::default()));
    let waits = start(&engine, Generation { max_tokens: most, ..awaits });
    let behind = start(&engine, plain(30, 3, "behind"));
    drop(waits);
    finish(behind).await;
    // And one that is being decoded.
    let mut decoding = start(&engine, plain(20, PAGES * 16 - 20, "running"));
    next(&mut decoding).await;
    let behind = start(&engine, plain(30, 3, "behind"));
    drop(decoding);
    finish(behind).await;
}

#[tokio::test]
async fn what_never_fits_is_refused_and_what_does_not_fit_yet_waits() {
    let engine = engine(4);
    let mut large = start(&engine, plain(60, 20, "large"));
    let refused = next(&mut large).await;
    assert!(matches!(refused, Some(Event::Failed(Error::TooLarge { wanted: 5, total: 4 }))), "{refused:?}");
    let both = [start(&engine, plain(40, 8, "a")), start(&engine, plain(40, 8, "b"))];
    for events in both {
        assert_eq!(finish(events).await.tokens, 8);
    }
}

#[tokio::test]
async fn answers_decoded_together_are_the_answers_given_alone() {
    let engine = engine(PAGES);
    let mut alone = Vec::new();
    for prompt in [20, 33, 47] {
        alone.push(finish(start(&engine, plain(prompt, 12, "a"))).await.text);
    }
    let together: Vec<Events> =
        [20, 33, 47].map(|prompt| start(&engine, plain(prompt, 12, "a"))).into_iter().collect();
    for (events, want) in together.into_iter().zip(alone) {
        assert_eq!(finish(events).await.text, want);
    }
}

#[tokio::test]
async fn a_worker_that_only_ever_reuses_knows_what_a_row_costs() {
    let other = engine(PAGES);
    let (prefix, chunk) = (section(&other, 8, 2).await, section(&other, 40, 3).await);
    let worker = engine(PAGES);
    assert_eq!(worker.backlog(), None, "nothing is known before anything was done");
    let question = 80;
    let generation = Generation {
        ids: ids(48 + question, 1),
        assembly: Assembly::new(8, &[40], question, false),
        ..stale(prefix, chunk)
    };
    finish(start(&worker, generation)).await;
    assert!(worker.backlog().is_some_and(|(_, per_row)| per_row > 0.0));
}
