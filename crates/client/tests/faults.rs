//! A store that misbehaves never fails a read: its chunks are missing, with the reason.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod faulty;

use bytes::Bytes;
use cacheclip_chunk::ByteSpan;
use cacheclip_client::{Item, Located, Outcome, StoreClient};
use cacheclip_rpc::v1::{MissReason, Tier};
use cacheclip_service::ConnectOptions;
use faulty::{Fault, Faulty, LAYOUT, SHAPE, container, key, layer};
use futures::StreamExt as _;
use std::sync::atomic::Ordering;

/// What came of one chunk.
#[derive(Debug, Default, PartialEq, Eq)]
struct Came {
    heads: u32,
    extras: u32,
    layers: Vec<u32>,
    missing: Option<MissReason>,
}

/// Reads layers of the chunks and checks what every read promises.
async fn read(client: &StoreClient, chunks: &[u8]) -> Vec<Came> {
    let keys: Vec<_> = chunks.iter().map(|n| key(*n)).collect();
    let mut items = client.get_layers(LAYOUT, &keys, 0..SHAPE.layers);
    let mut came: Vec<Came> = chunks.iter().map(|_| Came::default()).collect();
    while let Some(item) = items.next().await {
        let chunk = item.chunk();
        let this = &mut came[chunk];
        assert_eq!(this.missing, None, "nothing follows a missing chunk");
        match item {
            Item::Head { head, tier, .. } => {
                assert_eq!((head.key(), tier), (keys[chunk], Tier::StoreDisk));
                this.heads += 1;
            }
            Item::Spans { spans, .. } => {
                assert_eq!(spans, [ByteSpan { start: 0, end: 3 }; 5]);
                this.extras += 1;
            }
            Item::Rank { version, ranks, .. } => {
                assert_eq!((version, ranks), (2, vec![1, 2, 3, 4, 5]));
                this.extras += 1;
            }
            Item::Layer(it) => {
                assert_eq!(it.data, layer(chunks[chunk], it.layer), "wrong bytes came out");
                this.layers.push(it.layer);
            }
            Item::Missing { reason, .. } => this.missing = Some(reason),
        }
    }
    for this in &came {
        let complete = this.heads == 1 && this.extras == 2 && this.layers == [0, 1, 2, 3];
        assert!(complete || this.missing.is_some(), "neither complete nor missing: {this:?}");
    }
    came
}

fn whole() -> Came {
    Came { heads: 1, extras: 2, layers: vec![0, 1, 2, 3], missing: None }
}

#[tokio::test]
async fn layers_come_verified_decoded_and_in_order() {
    let (_running, client) = Faulty::default().serve().await;
    assert_eq!(read(&client, &[1, 3, 5]).await, [whole(), whole(), whole()]);
    assert_eq!(read(&client, &[]).await, []);
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
    let name = "cacheclip_client_verify_failures_total{where=\"wire\"}";
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
    let client = StoreClient::connect(&address.to_string(), &ConnectOptions::default()).unwrap();
    assert_eq!(read(&client, &[1]).await[0].missing, Some(MissReason::Unavailable));
    let located = client.lookup(LAYOUT, &[key(1), key(2)]).await;
    assert_eq!(located, [Located::Missing(MissReason::Unavailable); 2]);
    assert!(client.put(container(1).bytes().clone()).await.is_err());
    assert!(client.delete(LAYOUT, &[key(1)]).await.is_err());
}

#[tokio::test]
async fn a_deaf_store_is_not_waited_for() {
    let (_running, client) = Faulty::with(Fault::Deaf).serve().await;
    assert_eq!(read(&client, &[1]).await[0].missing, Some(MissReason::Timeout));
    assert_eq!(client.lookup(LAYOUT, &[key(1)]).await, [Located::Missing(MissReason::Timeout)]);
}

#[tokio::test]
async fn lookup_put_and_delete_say_what_the_store_says() {
    let store = Faulty::default();
    let (_running, client) = store.serve().await;
    let located = client.lookup(LAYOUT, &[key(1), key(2)]).await;
    let found = Located::Found { container: container(1).hash(), bytes: 9, tier: Tier::StoreRam };
    assert_eq!(located, [found, Located::Missing(MissReason::Evicted)]);
    assert_eq!(client.put(container(1).bytes().clone()).await.unwrap(), Outcome::Stored);
    assert_eq!(&store.put.lock().unwrap()[&key(1).as_bytes()[..]], container(1).bytes());
    let deleted = client.delete(LAYOUT, &[key(1), key(2)]).await.unwrap();
    assert_eq!((deleted.objects, deleted.bytes), (2, 7));
    assert!(client.put(Bytes::from_static(b"no container")).await.is_err());
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
