//! A client of the test's stores, and reads that check what every read promises.

use super::{LAYOUT, SHAPE, key, layer};
use cacheclip_chunk::{ByteSpan, Container};
use cacheclip_client::{Item, Options, StoreClient};
use cacheclip_rpc::v1::{MissReason, Tier};
use cacheclip_service::ConnectOptions;
use futures::StreamExt as _;
use std::time::{Duration, Instant};

/// No test waits longer than this for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// A client that loses patience as soon as a test may wait for it.
pub fn client(seeds: &[String]) -> StoreClient {
    let patience = Options {
        silence_seconds: 1.0,
        call_timeout_seconds: 1.0,
        put_timeout_seconds: 5.0,
        refresh_seconds: 0.1,
        members_timeout_seconds: 1.0,
        ..Options::default()
    };
    StoreClient::connect_with(seeds, &ConnectOptions::default(), patience).unwrap()
}

/// What came of one chunk.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Came {
    pub heads: u32,
    pub extras: u32,
    pub layers: Vec<u32>,
    pub missing: Option<MissReason>,
}

/// A chunk of which everything came.
pub fn whole() -> Came {
    Came { heads: 1, extras: 2, layers: vec![0, 1, 2, 3], missing: None }
}

/// Reads layers of the chunks and checks what every read promises.
pub async fn read(client: &StoreClient, chunks: &[u8]) -> Vec<Came> {
    read_in_order(client, chunks).await.0
}

/// The same, with the order in which layers came: chunk and layer.
pub async fn read_in_order(client: &StoreClient, chunks: &[u8]) -> (Vec<Came>, Vec<(usize, u32)>) {
    let keys: Vec<_> = chunks.iter().map(|n| key(*n)).collect();
    let mut items = client.get_layers(LAYOUT, &keys, 0..SHAPE.layers);
    let mut came: Vec<Came> = chunks.iter().map(|_| Came::default()).collect();
    let mut order = Vec::new();
    while let Some(item) = tokio::time::timeout(PATIENCE, items.next()).await.expect("in time") {
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
            Item::Ids { ids, .. } => {
                assert_eq!(ids, [10, 11, 12, 13, 14]);
                this.extras += 1;
            }
            Item::Layer(it) => {
                assert_eq!(it.data, layer(chunks[chunk], it.layer), "wrong bytes came out");
                this.layers.push(it.layer);
                order.push((chunk, it.layer));
            }
            Item::Missing { reason, .. } => this.missing = Some(reason),
        }
    }
    for this in &came {
        let complete = this.heads == 1 && this.extras >= 2 && this.layers == [0, 1, 2, 3];
        assert!(complete || this.missing.is_some(), "neither complete nor missing: {this:?}");
    }
    (came, order)
}

/// Whole containers of the chunks, in their order.
pub async fn got(client: &StoreClient, chunks: &[u8]) -> Vec<Result<Container, MissReason>> {
    let keys: Vec<_> = chunks.iter().map(|n| key(*n)).collect();
    let mut containers = client.get(LAYOUT, &keys);
    let mut got: Vec<_> = chunks.iter().map(|_| None).collect();
    while let Some((index, container)) =
        tokio::time::timeout(PATIENCE, containers.next()).await.expect("in time")
    {
        assert!(got[index].replace(container).is_none(), "every chunk comes once");
    }
    got.into_iter().map(|it| it.expect("every chunk comes or is missing")).collect()
}

/// Waits for a condition; fails the test if it does not come true.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
