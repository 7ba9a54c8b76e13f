//! Damage and want of room cost time and never an answer: damaged KV is found, set aside, counted and computed
//! again; what cannot be stored is served all the same.

mod support;

use cacheclip::fleet::Fleet;
use cacheclip_chunk::Head;
use cacheclip_rpc::v1::{MissReason, Tier};
use cacheclip_tests::until;
use std::fs::OpenOptions;
use std::path::Path;
use support::{TestFleet, containers, corpus, counted, data, name, options, over, quarantined, soon, under};
use tokio::sync::Mutex;

/// One process has one set of counters: those who count damage take turns.
static COUNTING: Mutex<()> = Mutex::const_new(());

const VERIFY_FAILURES: &str = "verify_failures_total";

async fn start(data: &Path) -> TestFleet {
    let admin = Some("127.0.0.1:0".to_owned());
    TestFleet::with(data, |options| options.gateway.service.admin_listen = admin).await
}

/// One bit in the middle of the second layer's stored bytes.
fn flip_a_bit(path: &Path) {
    let mut bytes = std::fs::read(path).expect("a container");
    let head = Head::parse(&bytes).expect("a sound container");
    let segment = head.segments()[1];
    bytes[(segment.offset + segment.stored_len / 2) as usize] ^= 0x10;
    std::fs::write(path, bytes).expect("written");
}

fn cut_off(path: &Path, bytes: u64) {
    OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(bytes)).expect("cut");
}

/// Stops a fleet, damages the container of its third chunk, and starts another one on the same directory.
async fn damaged_object_costs_one_miss(seed: u64, damage: impl FnOnce(&Path)) {
    let _turn = COUNTING.lock().await;
    let data = data();
    let corpus = corpus(seed, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let fleet = start(data.path()).await;
    fleet.ingest_corpus(&corpus).await;
    let before = fleet.answer(request.clone()).await;
    let failures = counted(&fleet.metrics().await, VERIFY_FAILURES);
    fleet.stop().await;

    let victim = name(&before.chunks()[2]);
    let sound = std::fs::read(&containers(data.path())[&victim]).expect("a container");
    damage(&containers(data.path())[&victim]);
    let fleet = start(data.path()).await;
    let after = fleet.answer(request.clone()).await;
    assert_eq!(after.text(), before.text());
    assert_eq!(after.recomputed(), before.recomputed());
    for (index, chunk) in after.chunks().iter().enumerate() {
        if index == 2 {
            let how = (chunk.hit, chunk.tier(), chunk.reason());
            assert_eq!(how, (false, Tier::Computed, MissReason::Corrupt), "{chunk:?}");
        } else {
            assert!(chunk.hit && matches!(chunk.tier(), Tier::StoreDisk | Tier::StoreRam), "{chunk:?}");
        }
    }
    let counted_now = counted(&fleet.metrics().await, VERIFY_FAILURES);
    assert!(counted_now >= failures + 1.0, "{counted_now} after {failures}");
    let aside = quarantined(data.path());
    assert!(aside.len() == 1 && aside[0].starts_with(&victim), "{aside:?} instead of {victim}");
    until("the chunk is stored again", async || containers(data.path()).contains_key(&victim)).await;
    fleet.stop().await;

    let again = std::fs::read(&containers(data.path())[&victim]).expect("a container");
    assert!(again == sound, "what was computed again is what was stored at first");
    let fleet = start(data.path()).await;
    let healed = fleet.answer(request).await;
    assert!(healed.all_hit(), "{:?}", healed.explain());
    assert_eq!(healed.text(), before.text());
    let unmoved = counted(&fleet.metrics().await, VERIFY_FAILURES);
    assert_eq!(unmoved, counted_now, "sound containers are not counted");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_costs_one_miss_and_no_answer() {
    damaged_object_costs_one_miss(301, flip_a_bit).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_cut_off_in_its_payload_costs_one_miss_and_no_answer() {
    let half = |path: &Path| cut_off(path, std::fs::metadata(path).expect("a container").len() / 2);
    damaged_object_costs_one_miss(302, half).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_cut_off_in_its_head_costs_one_miss_and_no_answer() {
    damaged_object_costs_one_miss(303, |path| cut_off(path, 50)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_that_cannot_be_used_ends_the_start_with_one_line_that_names_it() {
    let data = data();
    let file = data.path().join("file");
    std::fs::write(&file, "in the way").expect("written");
    for path in [file.join("data"), file] {
        let error = soon(Fleet::start(options(&path))).await.expect_err("no fleet without a directory");
        let line = format!("{error:#}");
        assert!(line.contains(&path.display().to_string()), "{line:?} names {}", path.display());
        assert!(line.contains("cache-store") && line.contains("data_dir"), "{line:?} says whose it is");
        assert_eq!(line.lines().count(), 1, "{line:?}");
        assert_eq!(line.matches("os error").count(), 1, "{line:?} says once what the system said");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_fleets_cannot_use_one_data_directory() {
    let data = data();
    let first = TestFleet::start(data.path()).await;
    let error = soon(Fleet::start(options(data.path()))).await.expect_err("the directory is taken");
    let line = format!("{error:#}");
    assert!(line.contains(&data.path().display().to_string()) && line.contains("in use"), "{line:?}");
    let corpus = corpus(304, 1);
    let answer = first.answer(over(&corpus, &corpus.questions[0])).await;
    assert!(answer.usage().completion_tokens > 0, "the first one goes on");
    first.stop().await;
    TestFleet::start(data.path()).await.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_fits_on_disk_answers_go_on_without_storing() {
    let (roomy, full) = (data(), data());
    let corpus = corpus(305, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let fleet = TestFleet::start(roomy.path()).await;
    let expected = fleet.answer(request.clone()).await;
    fleet.stop().await;

    let tight = || TestFleet::with(full.path(), |options| options.store.disk_bytes = 4096);
    let fleet = tight().await;
    let ingested = fleet.ingest_corpus(&corpus).await;
    assert_eq!(ingested.computed as usize, corpus.documents.len(), "a full store is no error of an ingest");
    let answer = fleet.answer(request.clone()).await;
    assert!(
        answer.chunks().iter().all(|it| it.hit && it.tier() == Tier::WorkerRam),
        "{:?}",
        answer.explain()
    );
    assert_eq!(answer.text(), expected.text());
    assert!(containers(full.path()).is_empty());
    fleet.stop().await;

    let fleet = tight().await;
    let answer = fleet.answer(request).await;
    assert!(answer.all_missed(), "nothing was stored: {:?}", answer.explain());
    assert_eq!(answer.text(), expected.text());
    fleet.stop().await;
    assert!(containers(full.path()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_cap_holds_while_chunks_come_and_go() {
    // Containers that go while they are read are nobody's damage; should they be counted, then not as another test's.
    let _turn = COUNTING.lock().await;
    let data = data();
    let corpus = corpus(306, 3);
    let requests: Vec<_> = corpus.questions.iter().map(|question| over(&corpus, question)).collect();
    let sizes = |path: &Path| -> Vec<u64> {
        containers(path).values().filter_map(|path| std::fs::metadata(path).ok()).map(|it| it.len()).collect()
    };
    let fleet = TestFleet::start(data.path()).await;
    fleet.ingest_corpus(&corpus).await;
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(fleet.answer(request.clone()).await.done.text);
    }
    fleet.stop().await;
    let largest = sizes(data.path()).into_iter().max().expect("containers");
    let cap = 3 * largest;
    assert!(sizes(data.path()).iter().sum::<u64>() > cap, "the cap is smaller than what is there");

    // The cap was lowered, and the worker has no RAM: every request brings and evicts.
    let fleet = TestFleet::with(data.path(), |options| {
        options.store.disk_bytes = cap;
        options.worker.ram_bytes = 0;
    })
    .await;
    for (request, expected) in requests.iter().zip(&expected) {
        let answer = fleet.answer(request.clone()).await;
        assert_eq!(answer.text(), expected);
        assert!(
            answer.chunks().iter().any(|chunk| !chunk.hit),
            "not all of them fit: {:?}",
            answer.explain()
        );
        let used: u64 = sizes(data.path()).into_iter().sum();
        assert!(used <= cap, "{used} bytes at a cap of {cap}");
        let full = fleet.answer(under(request, "full", None)).await;
        assert!(full.usage().completion_tokens > 0);
    }
    fleet.stop().await;
    let left = sizes(data.path());
    assert!(!left.is_empty() && left.iter().sum::<u64>() <= cap, "{left:?}");
}
