use super::*;
use tempfile::TempDir;

const LAYOUT: LayoutId = LayoutId::from_bytes([1; 32]);

fn key(n: u8) -> ChunkKey {
    ChunkKey::from_bytes([n; 32])
}

fn document(n: u8) -> DocumentId {
    DocumentId::from_bytes([n; 32])
}

/// A journal whose file outlives it.
struct Test {
    dir: TempDir,
    journal: Option<Journal>,
}

impl Test {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut test = Self { dir, journal: None };
        test.reopen();
        test
    }

    fn reopen(&mut self) {
        self.journal = None;
        let lock = Arc::new(File::create(self.dir.path().join("lock")).unwrap());
        self.journal = Some(Journal::open(&self.dir.path().join("journal.redb"), lock).unwrap());
    }

    fn journal(&self) -> &Journal {
        self.journal.as_ref().unwrap()
    }

    fn hold(&self, by: u8, keys: &[ChunkKey], until: u64) -> bool {
        let claim = Claim { document: document(by), until };
        self.journal().hold(LAYOUT, keys, claim, self.journal().generation()).unwrap()
    }

    fn claimed(&self, key: ChunkKey, now: u64) -> Option<u64> {
        self.journal().lives(&[key], now).unwrap()[0].claimed
    }

    fn delete(&self, by: u8, now: u64) -> Deleted {
        self.delete_with(by, &[], now)
    }

    fn delete_with(&self, by: u8, further: &[ChunkKey], now: u64) -> Deleted {
        let weigh = |_: Option<LayoutId>, key: &ChunkKey| {
            let ram = (key.as_bytes()[0].is_multiple_of(2)).then_some(10);
            Some(Weight { disk: Some(10), ram, bucket: ram })
        };
        self.journal().delete_document(document(by), further, now, weigh).unwrap()
    }
}

#[test]
fn a_chunk_lives_as_long_as_its_last_claim() {
    let mut test = Test::new();
    test.hold(1, &[key(1), key(2)], 100);
    test.hold(2, &[key(1)], 200);
    test.hold(3, &[key(2)], NEVER);
    for _ in 0..2 {
        assert_eq!(test.claimed(key(1), 50), Some(200));
        assert_eq!(test.claimed(key(1), 200), None, "it ends at its time, not after it");
        assert_eq!(test.claimed(key(2), 500), Some(NEVER));
        assert_eq!(test.claimed(key(3), 50), None);
        test.reopen();
    }
    test.hold(2, &[key(1)], 150);
    assert_eq!(test.claimed(key(1), 50), Some(150), "the document's latest word counts");
}

#[test]
fn a_deletion_is_told_again_until_there_is_more_to_delete() {
    let mut test = Test::new();
    assert_eq!(test.journal().generation(), 1, "0 is nobody's");
    test.hold(1, &[key(1), key(2), key(3)], NEVER);
    test.hold(2, &[key(3)], NEVER);
    let first = test.delete(1, 10);
    assert_eq!((&first.gone[..], &first.kept[..]), (&[key(1), key(2)][..], &[key(3)][..]));
    let receipt = Receipt {
        generation: 2,
        disk: Size { objects: 2, bytes: 20 },
        ram: Size { objects: 1, bytes: 10 },
        bucket: Size { objects: 1, bytes: 10 },
        kept: 1,
        keys: vec![key(1), key(2)],
    };
    assert_eq!(first.receipt, receipt);
    test.reopen();
    let again = test.delete(1, 20);
    assert!(again.gone.is_empty() && again.kept.is_empty());
    assert_eq!(again.receipt, Receipt { generation: 3, ..receipt });

    test.hold(1, &[key(4)], NEVER);
    let more = test.delete(1, 30).receipt;
    assert_eq!((more.disk.objects, more.kept), (1, 0));
    assert_eq!(more.keys, [key(1), key(2), key(4)], "for who still caches what went before");
    assert_eq!(test.delete(2, 40).gone, [key(3)], "nobody else is left");
}

#[test]
fn a_receipt_that_was_written_before_there_were_buckets_is_read() {
    let size = Size { objects: 2, bytes: 20 };
    let keys = vec![key(1), key(2)];
    let receipt = Receipt { generation: 2, disk: size, ram: size, bucket: size, kept: 1, keys };
    let row = rows::pack_receipt(&receipt, 7);
    assert_eq!(rows::unpack_receipt(&row), (receipt.clone(), 7));
    let before = Receipt { bucket: Size::default(), ..receipt };
    assert_eq!(rows::unpack_receipt(&row[..row.len() - 12]), (before, 7));
}

#[test]
fn further_keys_go_with_a_document_where_nobody_claims_them() {
    let test = Test::new();
    test.hold(1, &[key(1)], NEVER);
    test.hold(2, &[key(3)], NEVER);
    let begun = test.journal().generation();
    test.delete(1, 10);
    let more = test.delete_with(1, &[key(3), key(5)], 20);
    assert_eq!((&more.gone[..], more.kept.len(), more.receipt.kept), (&[key(5)][..], 0, 0));
    assert_eq!((more.receipt.disk.objects, &more.receipt.keys[..]), (2, &[key(1), key(5)][..]));
    assert!(test.journal().refuses(&key(5), None, begun).unwrap());
    assert!(!test.journal().refuses(&key(3), None, begun).unwrap());
}

#[test]
fn a_claim_that_ended_keeps_nothing() {
    let test = Test::new();
    test.hold(1, &[key(1)], NEVER);
    test.hold(2, &[key(1)], 100);
    assert_eq!(test.delete(1, 100).gone, [key(1)]);
}

#[test]
fn who_began_before_a_deletion_is_refused_and_nobody_else() {
    let mut test = Test::new();
    let begun = test.journal().generation();
    test.hold(1, &[key(1)], NEVER);
    test.delete(1, 10);
    test.journal().delete(&[key(5)], 10).unwrap();
    for _ in 0..2 {
        let refuses =
            |key, by: Option<u8>, begun| test.journal().refuses(&key, by.map(document), begun).unwrap();
        assert!(refuses(key(1), None, begun) && refuses(key(5), None, begun));
        assert!(refuses(key(9), Some(1), begun), "a chunk of the document that nobody had seen yet");
        assert!(!refuses(key(9), Some(2), begun) && !refuses(key(9), None, begun));
        assert!(!refuses(key(1), Some(1), begun + 1), "brought anew");
        assert!(refuses(key(5), None, begun + 1) && !refuses(key(5), None, begun + 2));
        let keys = [key(1), key(5), key(9)];
        for begun in begun..begun + 3 {
            let deleted = test.journal().deleted_since(&keys, begun).unwrap();
            assert!(keys.iter().all(|it| deleted.contains(it) == refuses(*it, None, begun)));
        }
        test.reopen();
    }
    let claim = Claim { document: document(1), until: NEVER };
    assert!(!test.journal().hold(LAYOUT, &[key(9)], claim, begun).unwrap());
    assert_eq!(test.claimed(key(9), 10), None);
}

#[test]
fn the_doomed_are_remembered_until_they_are_gone() {
    let mut test = Test::new();
    test.journal().delete(&[key(1), key(2)], 10).unwrap();
    test.reopen();
    assert_eq!(test.journal().doomed().unwrap(), [key(1), key(2)]);
    test.journal().done(&[key(1)]).unwrap();
    test.reopen();
    assert_eq!(test.journal().doomed().unwrap(), [key(2)]);
    assert_eq!(test.journal().tombstones(10).unwrap(), [key(1), key(2)]);
}

#[test]
fn the_later_pin_stays_and_a_deletion_ends_it() {
    let mut test = Test::new();
    let pinned = |test: &Test, now| test.journal().lives(&[key(1)], now).unwrap()[0].pinned;
    test.journal().pin(&[key(1)], 100).unwrap();
    test.journal().pin(&[key(1)], 50).unwrap();
    test.reopen();
    assert_eq!((pinned(&test, 60), pinned(&test, 100)), (100, 0));
    test.journal().unpin(&[key(1), key(2)]).unwrap();
    assert_eq!(pinned(&test, 60), 0);
    test.journal().pin(&[key(1)], 100).unwrap();
    test.journal().delete(&[key(1)], 10).unwrap();
    assert_eq!(pinned(&test, 60), 0);
    assert_eq!(test.journal().sweep(1000, 0, 10).unwrap(), 0, "nothing is left to become due");
}

#[test]
fn sweeping_forgets_what_is_over_and_refuses_who_began_before_what_it_forgot() {
    let test = Test::new();
    test.hold(1, &[key(1), key(2)], 100);
    test.hold(1, &[key(2)], 300);
    test.journal().pin(&[key(2)], 120).unwrap();
    test.journal().delete(&[key(7)], 90).unwrap();
    test.delete(3, 95);
    let last = test.journal().generation();
    assert_eq!(test.journal().sweep(99, 0, 10).unwrap(), 0);
    assert_eq!(test.journal().sweep(120, 0, 1).unwrap(), 2, "one of each kind");
    assert!(!test.journal().all_lives().unwrap().contains_key(&key(1)));
    let life = Life { claimed: Some(300), pinned: 0 };
    assert_eq!(test.journal().all_lives().unwrap()[&key(2)], life, "what was renewed stays");

    assert_eq!(test.journal().sweep(120, 95, 10).unwrap(), 2);
    assert!(test.journal().tombstones(10).unwrap().is_empty());
    let refuses = |begun| test.journal().refuses(&key(50), None, begun).unwrap();
    assert!(refuses(last - 1) && !refuses(last));
}

#[test]
fn an_expired_object_leaves_no_claim() {
    let test = Test::new();
    test.hold(1, &[key(1), key(2)], 100);
    test.journal().lapse(&[key(1)], 100).unwrap();
    test.journal().lapse(&[key(2)], 99).unwrap();
    let lives = test.journal().all_lives().unwrap();
    assert!(!lives.contains_key(&key(1)) && lives.contains_key(&key(2)));
    assert_eq!(test.delete(1, 10).receipt.keys, [key(2)]);
    assert_eq!(test.journal().sweep(1000, 0, 10).unwrap(), 0);
}
