//! What every index promises; run on each implementation.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use cacheclip_cache_store::index::{Embedded, Entry, Index};
use cacheclip_chunk::{ChunkKey, ContainerHash, LayoutId};

fn key(n: u8) -> ChunkKey {
    ChunkKey::from_bytes([n; 32])
}

fn entry(n: u8) -> Entry {
    let id = [n; 32];
    Entry {
        layout: LayoutId::from_bytes(id),
        container: ContainerHash::from_bytes(id),
        bytes: u64::from(n) << 40,
    }
}

async fn conforms(index: &dyn Index) {
    let keys: Vec<_> = (1..=4).map(key).collect();
    assert_eq!(index.locate(&keys).await.unwrap(), [None; 4]);
    index.publish(&[(key(1), entry(1)), (key(2), entry(2)), (key(3), entry(3))]).await.unwrap();
    index.withdraw(&[key(2), key(4)]).await.unwrap();
    assert_eq!(index.locate(&keys).await.unwrap(), [Some(entry(1)), None, Some(entry(3)), None]);
    index.publish(&[(key(3), entry(9))]).await.unwrap();
    assert_eq!(index.locate(&[key(3), key(1)]).await.unwrap(), [Some(entry(9)), Some(entry(1))]);
    index.publish(&[]).await.unwrap();
    assert_eq!(index.locate(&[]).await.unwrap(), []);
}

#[tokio::test]
async fn the_embedded_index_conforms() {
    let dir = tempfile::tempdir().unwrap();
    conforms(&Embedded::open(dir.path().join("index.redb"), vec![]).await.unwrap()).await;
}

#[tokio::test]
async fn an_opened_index_says_what_the_catalogue_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index.redb");
    let keys: Vec<_> = (1..=3).map(key).collect();
    let index = Embedded::open(path.clone(), vec![(key(1), entry(1)), (key(2), entry(2))]).await.unwrap();
    drop(index);
    let index = Embedded::open(path.clone(), vec![(key(2), entry(5)), (key(3), entry(3))]).await.unwrap();
    assert_eq!(index.locate(&keys).await.unwrap(), [None, Some(entry(5)), Some(entry(3))]);
    drop(index);
    let whole = std::fs::read(&path).unwrap();
    for damage in [&whole[..100], &whole[..whole.len() / 2], b"", &[0xff; 8192]] {
        std::fs::write(&path, damage).unwrap();
        let index = Embedded::open(path.clone(), vec![(key(1), entry(1))]).await.unwrap();
        assert_eq!(index.locate(&keys).await.unwrap(), [Some(entry(1)), None, None]);
    }
}
