//! A store that misbehaves never fails a read: its chunks are missing, with the reason.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod faulty;

use bytes::Bytes;
use cacheclip_client::{Located, Outcome};
use cacheclip_rpc::v1::{MissReason, Tier};
use faulty::{Came, Fault, Faulty, LAYOUT, SHAPE, client, container, got, key, read, whole, with_ids};
use futures::StreamExt as _;
use std::sync::atomic::Ordering;

#[tokio::test]
async fn layers_come_verified_decoded_and_in_order() {
    let (_running, client) = Faulty::with(Fault::None).serve().await;
    assert_eq!(read(&client, &[1, 3, 5]).await, [whole(), whole(), whole()]);
    assert_eq!(read(&client, &[]).await, []);
}

#[tokio::test]
async fn ids_come_where_a_container_has_them() {
    let store = Faulty::with(Fault::None);
    store.hold(with_ids(9));
    let (_running, client) = store.serve().await;
    assert_eq!(read(&client, &[1, 9]).await, [whole(), Came { extras: 3, ..whole() }]);
}

#[tokio::test]
async fn damage_on_the_wire_costs_one_chunk_and_is_counted() {
    for fault in [Fault::Flip(1), Fault::Gap(1), Fault::WrongHead(1)] {
        let (_running, client) = Faulty::with(fault).serve().await;
        let came = read(&client, &[1, 3, 5]).await;
        assert_eq!(came[1].missing, Some(MissReason::Corrupt), "{fault:?}");
        assert!(!came[1].layers.contains(&1), "{fault:?}");
        assert_eq!((&came[0], &came[2]), (&whole(), &whole()), "{fault:?}");
    }
    let counted = cacheclip_service::telemetry::render();
    let name = "cacheclip_verify_failures_total{where=\"wire\"}";
    let line = counted.lines().find(|line| line.starts_with(name));
    assert!(line.is_some_and(|line| !line.ends_with(" 0")), "{counted}");
}

#[tokio::test]
async fn a_store_that_falls_silent_costs_the_rest_of_its_chunks() {
    let store = Faulty::with(Fault::Stall);
    let (_running, client) = store.serve().await;
    for came in read(&client, &[1, 3]).await {
        assert_eq!((came.layers, came.missing), (vec![0, 1], Some(MissReason::Timeout)));
    }
    assert_eq!(store.calls.load(Ordering::SeqCst), 1, "waiting as long again helps nobody");
}

#[tokio::test]
async fn a_read_that_breaks_off_goes_on_where_it_stopped() {
    let store = Faulty::with(Fault::Drop(1));
    let (_running, client) = store.serve().await;
    assert_eq!(read(&client, &[1, 3]).await, [whole(), whole()]);
    let first_layers: Vec<_> = store.asked.lock().unwrap().iter().map(|it| it.first_layer).collect();
    assert_eq!(first_layers, [0, 2], "the second call does not bring layers 0 and 1 again");
}

#[tokio::test]
async fn retries_are_bounded() {
    let store = Faulty::with(Fault::Refuse(u32::MAX));
    let (_running, client) = store.serve().await;
    for came in read(&client, &[1, 3]).await {
        assert_eq!(came.missing, Some(MissReason::Unavailable));
    }
    assert_eq!(store.calls.load(Ordering::SeqCst), 3);
    let (_running, client) = Faulty::with(Fault::Refuse(2)).serve().await;
    assert_eq!(read(&client, &[1]).await, [whole()]);
}

#[tokio::test]
async fn a_store_that_is_not_there_has_nothing() {
    // Bound and closed at once: nobody listens there.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let client = client(&[address.to_string()]);
    assert_eq!(read(&client, &[1]).await[0].missing, Some(MissReason::Unavailable));
    let located = client.lookup(LAYOUT, &[key(1), key(2)]).await;
    assert_eq!(located, [Located::Missing(MissReason::Unavailable); 2]);
    assert_eq!(got(&client, &[1]).await[0].as_ref().unwrap_err(), &MissReason::Unavailable);
    assert!(client.put(container(1).bytes().clone()).await.is_err());
    assert!(client.delete(LAYOUT, &[key(1)]).await.is_err());
}

#[tokio::test]
async fn a_deaf_store_is_not_waited_for() {
    let (_running, client) = Faulty::with(Fault::Deaf).serve().await;
    assert_eq!(read(&client, &[1]).await[0].missing, Some(MissReason::Timeout));
    let (_running, client) = Faulty::with(Fault::Deaf).serve().await;
    assert_eq!(client.lookup(LAYOUT, &[key(1)]).await, [Located::Missing(MissReason::Timeout)]);
}

#[tokio::test]
async fn lookup_put_and_delete_say_what_the_store_says() {
    let store = Faulty::with(Fault::None);
    let (_running, client) = store.serve().await;
    let located = client.lookup(LAYOUT, &[key(1), key(9)]).await;
    let bytes = container(1).bytes().len() as u64;
    let found = Located::Found { container: container(1).hash(), bytes, tier: Tier::StoreRam };
    assert_eq!(located, [found, Located::Missing(MissReason::NeverSeen)]);
    assert_eq!(client.put(container(9).bytes().clone()).await.unwrap(), Outcome::Stored);
    assert_eq!(&store.held.lock().unwrap()[&key(9).as_bytes()[..]], container(9).bytes());
    let deleted = client.delete(LAYOUT, &[key(1), key(9), key(10)]).await.unwrap();
    assert_eq!((deleted.objects, deleted.bytes, deleted.unreached), (2, 14, 0));
    assert!(client.put(Bytes::from_static(b"no container")).await.is_err());
}

#[tokio::test]
async fn whole_containers_come_byte_for_byte_or_not_at_all() {
    let store = Faulty::with(Fault::None);
    store
        .held
        .lock()
        .unwrap()
        .insert(Bytes::copy_from_slice(key(3).as_bytes()), container(4).bytes().clone());
    let (_running, client) = store.serve().await;
    let got = got(&client, &[1, 9, 3, 2]).await;
    assert_eq!(got[0].as_ref().unwrap().bytes(), container(1).bytes());
    assert_eq!(got[1].as_ref().unwrap_err(), &MissReason::NeverSeen);
    assert_eq!(got[2].as_ref().unwrap_err(), &MissReason::Corrupt, "another chunk's container");
    assert_eq!(got[3].as_ref().unwrap().bytes(), container(2).bytes());
    assert!(faulty::got(&client, &[]).await.is_empty());
}

#[tokio::test]
async fn a_caller_that_goes_away_stops_the_stores_work() {
    let store = Faulty::with(Fault::Stall);
    let (running, client) = store.serve().await;
    let mut items = client.get_layers(LAYOUT, &[key(1)], 0..SHAPE.layers);
    assert!(items.next().await.is_some());
    drop(items);
    // The store's stream ends only when its reader has gone: a drain would have to abandon it otherwise.
    assert_eq!(running.drain().await.abandoned, 0);
}
