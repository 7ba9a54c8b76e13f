use super::*;
use crate::testing::{self, Chunk};

fn check(dir: &Path) -> Report {
    Listing::directory(dir).unwrap().check(&|_| {})
}

fn findings(report: &Report) -> Vec<(&str, &Finding)> {
    report.findings.iter().map(|found| (found.path.to_str().unwrap(), &found.finding)).collect()
}

#[test]
fn whole_containers_are_good_and_the_progress_adds_up() {
    let dir = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..20).map(testing::chunk).collect();
    chunks.iter().for_each(|chunk| drop(testing::lay(dir.path(), chunk)));
    for name in OWN_FILES {
        fs::write(dir.path().join(name), b"its own").unwrap();
    }
    let directory = Listing::directory(dir.path()).unwrap();
    let (bytes, heard) = (directory.bytes(), std::sync::atomic::AtomicU64::new(0));
    let report = directory.check(&|bytes| {
        heard.fetch_add(bytes, Ordering::Relaxed);
    });
    assert_eq!(report, Report { good: 20, bytes, findings: Vec::new() });
    assert_eq!(bytes, chunks.iter().map(|chunk| chunk.bytes.len() as u64).sum::<u64>());
    assert_eq!(heard.into_inner(), bytes);
    assert!(!report.is_damaged() && report.is_complete());
}

#[test]
fn every_kind_of_damage_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..7).map(testing::chunk).collect();
    let paths: Vec<PathBuf> = chunks.iter().map(|chunk| testing::lay(dir.path(), chunk)).collect();
    let offset = |segment: usize| chunks[0].head.segments()[segment].offset;
    testing::flip(&paths[0], offset(0) + 3);
    testing::flip(&paths[0], offset(2));
    testing::flip(&paths[1], offset(1) - 1);
    testing::flip(&paths[2], 60);
    fs::OpenOptions::new().write(true).open(&paths[3]).unwrap().set_len(5000).unwrap();
    fs::write(&paths[4], &chunks[0].bytes).unwrap();
    let elsewhere = dir.path().join("objects/zz");
    fs::create_dir(&elsewhere).unwrap();
    fs::rename(&paths[5], elsewhere.join(paths[5].file_name().unwrap())).unwrap();

    let report = check(dir.path());
    assert!(report.is_damaged() && report.is_complete());
    assert_eq!(report.good, 1);
    let found = |n: usize| {
        let name = paths[n].file_name().unwrap();
        let of = report.findings.iter().filter(|it| it.path.file_name() == Some(name));
        of.map(|it| it.finding.clone()).collect::<Vec<_>>()
    };
    assert_eq!(found(0), [Finding::DamagedSegments { segments: vec![0, 2] }]);
    assert_eq!(found(1), [Finding::DamagedPadding]);
    assert!(matches!(&found(2)[..], [Finding::DamagedContainer { why }] if why.contains("check")));
    assert!(matches!(&found(3)[..], [Finding::DamagedContainer { why }] if why.contains("5000")));
    assert_eq!(found(4), [Finding::OtherKey { holds: chunks[0].key.to_string() }]);
    assert_eq!(found(5), [Finding::WrongFolder]);
    assert_eq!(report.findings.len(), 6);
}

#[test]
fn what_is_no_damage_is_reported_and_nothing_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let newer = testing::lay(dir.path(), &testing::chunk(1));
    let mut bytes = fs::read(&newer).unwrap();
    bytes[8] = 2;
    fs::write(&newer, &bytes).unwrap();
    for folder in ["temporary", "quarantine"] {
        fs::create_dir(dir.path().join(folder)).unwrap();
    }
    for path in ["temporary/7", "quarantine/x.0", "notes.txt", "objects/notes.txt"] {
        fs::write(dir.path().join(path), b"?").unwrap();
    }
    fs::write(newer.with_file_name("readme.md"), b"?").unwrap();
    let report = check(dir.path());
    let shelf = newer.parent().unwrap().strip_prefix(dir.path()).unwrap().to_str().unwrap();
    let (container, readme) =
        (newer.strip_prefix(dir.path()).unwrap().to_str().unwrap(), format!("{shelf}/readme.md"));
    let mut expected = [
        ("temporary/7", &Finding::Leftover),
        ("quarantine/x.0", &Finding::Quarantined),
        ("notes.txt", &Finding::ForeignName),
        ("objects/notes.txt", &Finding::ForeignName),
        (readme.as_str(), &Finding::ForeignName),
        (container, &Finding::UnknownVersion { version: 2 }),
    ];
    expected.sort_by(|(a, _), (b, _)| Path::new(a).cmp(Path::new(b)));
    assert_eq!(findings(&report), expected);
    assert!(!report.is_damaged() && report.good == 0);
    assert_eq!(fs::read(&newer).unwrap(), bytes);
    assert!(dir.path().join("temporary/7").exists());
}

#[test]
fn what_is_no_data_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Listing::directory(&dir.path().join("nowhere")).unwrap_err().kind(), io::ErrorKind::NotFound);
    let why = Listing::directory(dir.path()).unwrap_err().to_string();
    assert!(why.contains("objects"), "{why}");
}
