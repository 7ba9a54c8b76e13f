//! The byte caps hold whatever is done, as counted on the disk itself.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

use cacheclip_rpc::v1::MissReason;
use cacheclip_rpc::v1::put_response::Outcome;
use common::{Calls, LAYOUT, TestStore, assemble, bytes_on_disk, container, key, options};
use proptest::prelude::*;
use std::os::unix::fs::FileExt as _;

const CAP: u64 = 100_000;

#[derive(Clone, Debug)]
enum Operation {
    Put(Vec<(u32, u32)>),
    Read(Vec<u32>),
    Delete(u32),
    Damage(u32),
    Restart,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        5 => prop::collection::vec((0u32..12, 1u32..120), 1..5).prop_map(Operation::Put),
        3 => prop::collection::vec(0u32..12, 1..4).prop_map(Operation::Read),
        1 => (0u32..12).prop_map(Operation::Delete),
        1 => (0u32..12).prop_map(Operation::Damage),
        1 => Just(Operation::Restart),
    ];
    prop::collection::vec(operation, 1..12)
}

async fn check(operations: Vec<Operation>) {
    let dir = tempfile::tempdir().unwrap();
    let options = || {
        let options = options(dir.path());
        cacheclip_cache_store::Options { disk_bytes: CAP, ram_bytes: CAP / 3, ..options }
    };
    let mut store = TestStore::start(options()).await;
    for operation in operations {
        match operation {
            Operation::Put(chunks) => {
                let puts = chunks.iter().map(|(n, tokens)| store.put(container(*n, *tokens)));
                futures::future::join_all(puts).await;
            }
            Operation::Read(chunks) => {
                let keys: Vec<_> = chunks.into_iter().map(key).collect();
                assemble(&store.get_layers(LAYOUT, &keys, 0, 0).await, keys.len());
            }
            Operation::Delete(n) => drop(store.delete(LAYOUT, &[key(n)]).await),
            Operation::Damage(n) => {
                if let Ok(file) = std::fs::OpenOptions::new().write(true).open(store.file(n)) {
                    file.write_all_at(b"damage", 4096).unwrap();
                }
            }
            Operation::Restart => store = store.restart(options()).await,
        }
        let stat = store.stat().await;
        let on_disk = bytes_on_disk(&store.data);
        assert!(on_disk <= CAP, "{on_disk} bytes on disk");
        assert_eq!(stat.disk_used_bytes, on_disk);
        assert!(stat.ram_used_bytes <= stat.ram_capacity_bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn caps_hold_over_any_operations(operations in operations()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(check(operations));
    }
}

#[tokio::test]
async fn a_full_store_evicts_what_was_not_used_for_longest() {
    let dir = tempfile::tempdir().unwrap();
    let size = container(0, 50).len() as u64;
    let options = cacheclip_cache_store::Options { disk_bytes: size * 3, ..options(dir.path()) };
    let store = TestStore::start(options).await;
    for n in 0..3 {
        assert_eq!(store.put(container(n, 50)).await, Outcome::Stored);
    }
    store.get(0).await.unwrap();
    // A probe is no use.
    store.lookup(LAYOUT, &[key(1)]).await;
    assert_eq!(store.put(container(3, 50)).await, Outcome::Stored);
    assert_eq!(store.reason(1).await, MissReason::Evicted);
    for n in [0, 2, 3] {
        assert_eq!(store.get(n).await.unwrap(), container(n, 50));
    }
}

#[tokio::test]
async fn a_container_larger_than_the_node_finds_no_room_and_evicts_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let small = container(0, 5);
    let options = cacheclip_cache_store::Options { disk_bytes: small.len() as u64, ..options(dir.path()) };
    let store = TestStore::start(options).await;
    assert_eq!(store.put(small).await, Outcome::Stored);
    assert_eq!(store.put(container(1, 400)).await, Outcome::NoRoom);
    assert!(store.get(0).await.is_ok());
    assert_eq!(store.reason(1).await, MissReason::NeverSeen);
}
