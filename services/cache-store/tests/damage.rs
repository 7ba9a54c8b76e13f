//! Damaged files: set aside, counted, reported, and nobody's answer.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

use cacheclip_chunk::Head;
use cacheclip_rpc::v1::MissReason;
use cacheclip_rpc::v1::put_response::Outcome;
use cacheclip_service::telemetry;
use common::{Calls, LAYOUT, TestStore, assemble, bytes_on_disk, container, key, layer, options};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}

fn truncate(path: &Path, len: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// The value of a counter in the process's metrics. Tests of one process share it: compare with `>`.
fn counter(line: &str) -> f64 {
    let text = telemetry::render();
    let found =
        text.lines().find_map(|it| it.strip_prefix(line)).unwrap_or_else(|| panic!("{line} in {text}"));
    found.trim().parse().unwrap()
}

#[tokio::test]
async fn a_flipped_bit_costs_one_chunk_and_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    for n in 0..3 {
        store.put(container(n, 20)).await;
    }
    let failures = counter("cacheclip_verify_failures_total{where=\"disk\"}");
    let entry = Head::parse(&container(1, 20)).unwrap().segments()[1];
    flip(&store.file(1), entry.offset + 3);

    let arrived = assemble(&store.get_layers(LAYOUT, &[0, 1, 2].map(key), 0, 0).await, 3);
    assert_eq!(arrived[1].missing, Some(MissReason::Corrupt));
    for n in [0, 2] {
        assert_eq!(arrived[n].missing, None);
        assert_eq!(arrived[n].segments[&2], layer(n as u32, 2, 20));
    }
    assert_eq!(store.reason(1).await, MissReason::Corrupt);
    let stat = store.stat().await;
    assert_eq!((stat.objects, stat.quarantined), (2, 1));
    assert_eq!(stat.disk_used_bytes, bytes_on_disk(&store.data));
    assert!(!store.file(1).exists());
    assert!(counter("cacheclip_verify_failures_total{where=\"disk\"}") > failures);
    assert!(counter("cacheclip_store_quarantined_total") >= 1.0);

    // The chunk was computed anew and put again.
    assert_eq!(store.put(container(1, 20)).await, Outcome::Stored);
    assert_eq!(store.get(1).await.unwrap(), container(1, 20));
}

#[tokio::test]
async fn a_flipped_bit_in_the_head_is_noticed_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(1, 20)).await;
    flip(&store.file(1), 40);
    assert_eq!(store.get(1).await, Err(MissReason::Corrupt));
    assert_eq!(store.stat().await.quarantined, 1);
}

#[tokio::test]
async fn a_truncated_file_is_noticed_while_serving() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(1, 20)).await;
    truncate(&store.file(1), 5000);
    assert_eq!(store.get(1).await, Err(MissReason::Corrupt));
    let stat = store.stat().await;
    assert_eq!((stat.objects, stat.quarantined, stat.disk_used_bytes), (0, 1, 5000));
}

#[tokio::test]
async fn a_file_that_other_hands_removed_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(1, 20)).await;
    std::fs::remove_file(store.file(1)).unwrap();
    assert_eq!(store.get(1).await, Err(MissReason::Corrupt));
    assert_eq!(store.stat().await.disk_used_bytes, 0);
    assert_eq!(store.put(container(1, 20)).await, Outcome::Stored);
}

#[tokio::test]
async fn what_verified_once_is_served_from_ram_whatever_happens_to_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(1, 20)).await;
    store.get(1).await.unwrap();
    flip(&store.file(1), 4096);
    assert_eq!(store.get(1).await.unwrap(), container(1, 20));
}

#[tokio::test]
async fn a_start_sets_damaged_files_aside_and_leaves_foreign_ones_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    for n in 0..4 {
        store.put(container(n, 20)).await;
    }
    let (cut, broken, newer) = (store.file(0), store.file(1), store.file(2));
    truncate(&cut, 50);
    flip(&broken, 60);
    // The version of a later release.
    OpenOptions::new().write(true).open(&newer).unwrap().write_all_at(&[2], 8).unwrap();
    let store = store.restart(options(dir.path())).await;
    let stat = store.stat().await;
    assert_eq!((stat.objects, stat.quarantined), (1, 2));
    assert_eq!(stat.disk_used_bytes, bytes_on_disk(&store.data));
    assert_eq!([store.reason(0).await, store.reason(1).await], [MissReason::Corrupt; 2]);
    assert_eq!(store.reason(2).await, MissReason::NeverSeen);
    assert!(newer.exists() && !cut.exists() && !broken.exists());
    assert_eq!(store.get(3).await.unwrap(), container(3, 20));
}
