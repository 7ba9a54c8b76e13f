use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

fn key(n: u32) -> ChunkKey {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    ChunkKey::from_bytes(bytes)
}

const LAYOUT: LayoutId = LayoutId::from_bytes([1; 32]);

fn record(bytes: u64) -> Record {
    Record { layout: LAYOUT, hash: ContainerHash::from_bytes([2; 32]), bytes, head_len: 192 }
}

#[test]
fn the_least_recently_used_goes_first_and_damaged_files_before_it() {
    let mut catalogue = Catalogue::new(100, Clock::system());
    for n in 0..3 {
        assert!(catalogue.reserve(30));
        catalogue.insert(key(n), record(30));
    }
    catalogue.touch(&key(0));
    catalogue.set_aside("x".into(), 5);
    assert!(!catalogue.reserve(6));
    assert!(matches!(catalogue.victim(), Some(Victim::Quarantined(_, 5))));
    assert!(matches!(catalogue.victim(), Some(Victim::Object(gone, 30)) if gone == key(1)));
    assert_eq!(catalogue.find(LAYOUT, &key(1)), Err(MissReason::Evicted));
    assert_eq!(catalogue.used(), 95, "bytes count until their file is gone");
    catalogue.release(35);
    assert!(catalogue.reserve(40));
}

#[test]
fn reasons_are_told_and_their_memory_is_bounded() {
    let mut catalogue = Catalogue::new(100, Clock::system());
    catalogue.insert(key(1), record(1));
    assert_eq!(catalogue.find(LayoutId::from_bytes([9; 32]), &key(1)), Err(MissReason::Layout));
    assert_eq!(catalogue.find(LAYOUT, &key(2)), Err(MissReason::NeverSeen));
    catalogue.take(&key(1), MissReason::Deleted);
    assert_eq!(catalogue.find(LAYOUT, &key(1)), Err(MissReason::Deleted));
    for n in 0..REMEMBERED as u32 {
        catalogue.remember(key(n + 10), MissReason::Corrupt);
    }
    assert_eq!(catalogue.find(LAYOUT, &key(1)), Err(MissReason::NeverSeen));
    assert_eq!(catalogue.gone.reasons.len(), REMEMBERED);
}

#[test]
fn what_is_over_is_not_found_and_what_is_pinned_is_no_victim() {
    let time = Arc::new(AtomicU64::new(100));
    let mut catalogue = Catalogue::new(100, Clock::manual(Arc::clone(&time)));
    for n in 0..3 {
        assert!(catalogue.reserve(10));
        catalogue.insert(key(n), record(10));
    }
    catalogue.expire_at(&key(1), 110);
    assert!(catalogue.pin(&key(0), 110) && !catalogue.pin(&key(7), 110));
    catalogue.touch(&key(0));
    assert_eq!((catalogue.pinned_bytes(), catalogue.expired(109, 9)), (10, vec![]));
    assert!(catalogue.find(LAYOUT, &key(1)).is_ok());
    assert!(matches!(catalogue.victim(), Some(Victim::Object(gone, 10)) if gone == key(1)));
    assert!(matches!(catalogue.victim(), Some(Victim::Object(gone, 10)) if gone == key(2)));
    assert!(catalogue.victim().is_none(), "all that is left is pinned");
    assert!(catalogue.expired(1000, 9).is_empty(), "what was evicted does not expire");

    catalogue.expire_at(&key(0), 120);
    time.store(120, Ordering::Relaxed);
    assert_eq!(catalogue.find(LAYOUT, &key(0)), Err(MissReason::Expired));
    assert_eq!(catalogue.expired(120, 9), [key(0)]);
    catalogue.expire_at(&key(0), NEVER);
    assert!(catalogue.find(LAYOUT, &key(0)).is_ok() && catalogue.expired(1000, 9).is_empty());
    assert!(matches!(catalogue.victim(), Some(Victim::Object(gone, 10)) if gone == key(0)), "its pin ended");
    assert_eq!(catalogue.pinned_bytes(), 0);
}

#[test]
fn the_damaged_files_of_a_key_are_found_by_their_names() {
    let mut catalogue = Catalogue::new(100, Clock::system());
    for (n, serial) in [(1, 0), (2, 0), (1, 1)] {
        catalogue.set_aside(format!("quarantine/{}.{serial}", key(n)).into(), 5);
    }
    let taken = catalogue.take_damaged(&HashSet::from([key(1)]));
    assert_eq!((taken.len(), catalogue.quarantined(), catalogue.used()), (2, 1, 15));
}

#[test]
fn what_leaves_the_disk_is_known_for_as_long_as_the_bucket_may_have_it() {
    let mut catalogue = Catalogue::new(100, Clock::system());
    for (n, remote) in [(0, Remote::Yes), (1, Remote::Unsure), (2, Remote::No)] {
        assert!(catalogue.reserve(10));
        catalogue.insert(key(n), record(10));
        catalogue.set_remote(&key(n), remote);
    }
    assert_eq!(catalogue.to_upload(), [key(1), key(2)]);
    while let Some(Victim::Object(_, bytes)) = catalogue.victim() {
        catalogue.release(bytes);
    }
    assert_eq!((catalogue.len(), catalogue.used()), (0, 0));
    assert_eq!(catalogue.find(LAYOUT, &key(0)), Ok(record(10)));
    for n in [1, 2] {
        assert_eq!(catalogue.find(LAYOUT, &key(n)), Err(MissReason::Evicted), "nobody counts on it");
    }
    assert_eq!((catalogue.strays(9), catalogue.known(&key(2))), (vec![key(1)], None));
    assert_eq!(catalogue.bucket(), Held { objects: 1, bytes: 10 });
    assert_eq!(catalogue.records().map(|(key, _)| key).collect::<Vec<_>>(), [key(0)]);

    assert!(!catalogue.pin(&key(0), 7), "there is nothing to keep from eviction");
    catalogue.expire_at(&key(0), 9);
    assert!(catalogue.reserve(10));
    catalogue.arrive(&key(0));
    assert_eq!(catalogue.expired(9, 9), [key(0)], "its time goes on");
    assert!(matches!(catalogue.victim(), Some(Victim::Object(gone, 10)) if gone == key(0)));
    catalogue.set_remote(&key(0), Remote::No);
    assert_eq!((catalogue.known(&key(0)), catalogue.bucket()), (None, Held::default()));
    assert!(catalogue.expired(9, 9).is_empty());

    // Another container under a key that the bucket has takes the place of that one; the same need not go again.
    catalogue.insert_remote(key(3), record(10));
    catalogue.insert(key(3), Record { hash: ContainerHash::from_bytes([7; 32]), ..record(10) });
    assert_eq!((catalogue.remote(&key(3)), catalogue.bucket()), (Remote::Unsure, Held::default()));
    catalogue.insert_remote(key(4), record(10));
    catalogue.insert(key(4), record(10));
    assert_eq!(catalogue.remote(&key(4)), Remote::Yes);
    assert!(catalogue.take(&key(4), MissReason::Deleted).is_some_and(|taken| taken.on_disk && taken.here));
    assert_eq!(catalogue.bucket(), Held::default());
}
