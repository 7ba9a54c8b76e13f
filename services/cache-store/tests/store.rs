//! What a store promises its clients, over a real port and real files.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, Container, LayoutId};
use cacheclip_rpc::status::invalid_field;
use cacheclip_rpc::v1::put_response::Outcome;
use cacheclip_rpc::v1::{GetLayersRequest, LookupRequest, MissReason, PutFrame, Tier, kv_frame, put_frame};
use common::{Calls, LAYOUT, SHAPE, TestStore, assemble, bytes_on_disk, container, key, layer, options};
use tonic::Code;

#[tokio::test]
async fn what_was_put_comes_back_whole_and_by_layers() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    for n in 0..3 {
        assert_eq!(store.put(container(n, 20 + n)).await, Outcome::Stored);
    }
    assert_eq!(store.get(1).await.unwrap(), container(1, 21));

    let keys: Vec<ChunkKey> = [2, 9, 0].map(key).to_vec();
    let frames = store.get_layers(LAYOUT, &keys, 1, 3).await;
    let arrived = assemble(&frames, 3);
    assert_eq!(arrived[1].missing, Some(MissReason::NeverSeen));
    for (chunk, n) in [(0, 2), (2, 0)] {
        let segments = &arrived[chunk].segments;
        assert_eq!(segments.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4], "layers 1 and 2, spans, rank");
        assert_eq!(segments[&1], layer(n, 1, 20 + n));
        assert_eq!(segments[&2], layer(n, 2, 20 + n));
    }
    let order: Vec<_> = frames
        .iter()
        .filter_map(|frame| match &frame.frame {
            Some(kv_frame::Frame::Segment(it)) if it.index < SHAPE.layers => Some((it.index, frame.chunk)),
            _ => None,
        })
        .collect();
    assert!(order.is_sorted(), "layer-major: {order:?}");

    let entries = store.lookup(LAYOUT, &keys).await;
    let hash = Container::parse(container(2, 22)).unwrap().hash();
    assert!(entries[0].found && !entries[1].found && entries[2].found);
    assert_eq!(entries[0].container_hash[..], hash.as_bytes()[..]);
    assert_eq!(entries[0].bytes, container(2, 22).len() as u64);
    assert_eq!(entries[1].reason(), MissReason::NeverSeen);
}

#[tokio::test]
async fn a_second_read_is_served_from_ram() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(1, 30)).await;
    assert_eq!(store.lookup(LAYOUT, &[key(1)]).await[0].tier(), Tier::StoreDisk);
    assert_eq!(assemble(&store.get_layers(LAYOUT, &[key(1)], 0, 0).await, 1)[0].tier, Tier::StoreDisk);
    let again = assemble(&store.get_layers(LAYOUT, &[key(1)], 0, 0).await, 1);
    assert_eq!(again[0].tier, Tier::StoreRam);
    assert_eq!(again[0].segments[&0], layer(1, 0, 30));
    assert_eq!(store.lookup(LAYOUT, &[key(1)]).await[0].tier(), Tier::StoreRam);
    assert_eq!(store.stat().await.ram_used_bytes, container(1, 30).len() as u64);
}

#[tokio::test]
async fn the_first_writer_of_a_key_wins() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    let (first, second) = (container(1, 10), container(1, 11));
    assert_eq!(store.put(first.clone()).await, Outcome::Stored);
    let answer = store.try_put(LAYOUT, key(1), second.len() as u64, second).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Existed);
    assert_eq!(answer.container_hash[..], Container::parse(first.clone()).unwrap().hash().as_bytes()[..]);
    assert_eq!(store.get(1).await.unwrap(), first);

    let racing = (0..8).map(|_| store.put(container(7, 40)));
    let outcomes = futures::future::join_all(racing).await;
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Outcome::Stored).count(), 1);
    assert_eq!(store.stat().await.disk_used_bytes, bytes_on_disk(&store.data));
}

#[tokio::test]
async fn a_deleted_chunk_is_gone_and_may_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(1, 10)).await;
    store.get(1).await.unwrap();
    assert_eq!(
        store.delete(LayoutId::from_bytes([7; 32]), &[key(1)]).await.objects,
        0,
        "another layout's key"
    );
    let deleted = store.delete(LAYOUT, &[key(1), key(2)]).await;
    assert_eq!((deleted.objects, deleted.bytes), (1, container(1, 10).len() as u64));
    assert_eq!(store.reason(1).await, MissReason::Deleted);
    assert_eq!(store.get(1).await, Err(MissReason::Deleted));
    let stat = store.stat().await;
    assert_eq!((stat.objects, stat.disk_used_bytes, stat.ram_used_bytes), (0, 0, 0));
    assert_eq!(bytes_on_disk(&store.data), 0);
    assert_eq!(store.put(container(1, 10)).await, Outcome::Stored);
    assert!(store.get(1).await.is_ok());
}

#[tokio::test]
async fn a_restart_keeps_what_was_published() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    for n in 0..5 {
        store.put(container(n, 10 + n)).await;
    }
    let before = store.stat().await;
    let store = store.restart(options(dir.path())).await;
    assert_eq!(store.stat().await, before);
    assert_eq!(store.get(3).await.unwrap(), container(3, 13));

    // The index is a cache: a damaged one is made anew. Leftovers of a crash are removed.
    let data = store.data.clone();
    drop(store.client);
    store.running.drain().await;
    std::fs::write(data.join("index.redb"), b"not a database").unwrap();
    std::fs::write(data.join("temporary/17"), [0; 9000]).unwrap();
    let store = TestStore::start(options(dir.path())).await;
    assert_eq!(store.get(3).await.unwrap(), container(3, 13));
    assert_eq!(bytes_on_disk(&data), before.disk_used_bytes);
}

#[tokio::test]
async fn kv_of_another_layout_is_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    store.put(container(1, 10)).await;
    let other = LayoutId::from_bytes([7; 32]);
    assert_eq!(store.lookup(other, &[key(1)]).await[0].reason(), MissReason::Layout);
    let arrived = assemble(&store.get_layers(other, &[key(1)], 0, 0).await, 1);
    assert_eq!(arrived[0].missing, Some(MissReason::Layout));
    let too_deep = assemble(&store.get_layers(LAYOUT, &[key(1)], 0, SHAPE.layers + 1).await, 1);
    assert_eq!(too_deep[0].missing, Some(MissReason::Layout));
}

#[tokio::test]
async fn a_put_that_is_not_what_it_says_is_refused_by_field() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    let good = container(1, 10);
    let len = good.len() as u64;
    let mut flipped = good.to_vec();
    flipped[good.len() - 1] ^= 1;
    let mut padding = good.to_vec();
    padding[4000] = 1;
    let longer = [&good[..], &[0]].concat();
    let cases = [
        ("head.key", LAYOUT, key(2), len, good.clone()),
        ("head.layout", LayoutId::from_bytes([7; 32]), key(1), len, good.clone()),
        ("head.bytes", LAYOUT, key(1), 12, good.clone()),
        ("head.bytes", LAYOUT, key(1), u64::MAX, good.clone()),
        ("head.bytes", LAYOUT, key(1), len + 1, longer.clone().into()),
        ("data", LAYOUT, key(1), len, longer.into()),
        ("data", LAYOUT, key(1), len, good.slice(..good.len() - 1)),
        ("data", LAYOUT, key(1), len, flipped.into()),
        ("data", LAYOUT, key(1), len, padding.into()),
        ("data", LAYOUT, key(1), len, vec![7; good.len()].into()),
    ];
    for (case, (field, layout, key, announced, bytes)) in cases.into_iter().enumerate() {
        let status = store.try_put(layout, key, announced, bytes).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "case {case}: {status}");
        assert_eq!(invalid_field(&status).as_deref(), Some(field), "case {case}: {status}");
    }
    assert_eq!(store.reason(1).await, MissReason::NeverSeen);
    assert_eq!((store.stat().await.disk_used_bytes, bytes_on_disk(&store.data)), (0, 0));
}

#[tokio::test]
async fn an_invalid_request_names_its_field() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(options(dir.path())).await;
    let mut client = store.client.clone();
    let id = Bytes::from_static(&[1; 32]);
    let lookup =
        |layout: &Bytes, keys: Vec<Bytes>| LookupRequest { layout: layout.clone(), keys, elsewhere: false };
    let status = client.lookup(lookup(&Bytes::new(), vec![])).await.unwrap_err();
    assert_eq!(invalid_field(&status).as_deref(), Some("layout"));
    let status = client.lookup(lookup(&id, vec![id.clone(), Bytes::new()])).await.unwrap_err();
    assert_eq!(invalid_field(&status).as_deref(), Some("keys[1]"));
    let status = client.lookup(lookup(&id, vec![id.clone(); 5000])).await.unwrap_err();
    assert_eq!(invalid_field(&status).as_deref(), Some("keys"));
    let request = GetLayersRequest { layout: id, keys: vec![], first_layer: 2, end_layer: 2 };
    let status = client.get_layers(request).await.unwrap_err();
    assert_eq!(invalid_field(&status).as_deref(), Some("first_layer"));
    let headless = PutFrame { frame: Some(put_frame::Frame::Data(Bytes::new())) };
    let status = client.put(futures::stream::iter([headless])).await.unwrap_err();
    assert_eq!(invalid_field(&status).as_deref(), Some("head"));
}

#[tokio::test]
async fn an_unusable_directory_stops_the_start_with_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    let error = cacheclip_cache_store::open(options(&dir.path().join("file"))).await.unwrap_err().to_string();
    assert!(error.starts_with("data_dir ") && error.contains("choose a directory"), "{error}");
    assert!(!error.contains('\n'));

    let _first = cacheclip_cache_store::open(options(dir.path())).await.unwrap();
    let error = cacheclip_cache_store::open(options(dir.path())).await.unwrap_err().to_string();
    assert!(error.contains("in use by another cache-store"), "{error}");
}
