//! Checks a data directory from outside, without a store and without changing anything.

use crate::disk;
use crate::inspect::{self, Unusable};
use crate::read::Damage;
use bytes::Bytes;
use cacheclip_chunk::container::parse_spans;
use cacheclip_chunk::{FormatError, Head, SegmentKind};
use serde::Serialize;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// What belongs in a data directory beside the folders of containers.
const OWN_FILES: [&str; 4] = ["lock", "index.redb", "journal.redb", "journal.new"];

/// What is the matter with a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "finding", rename_all = "snake_case")]
pub enum Finding {
    /// Segments whose bytes are not those that were written, or do not decode.
    DamagedSegments {
        /// Their places in the segment table, ascending: layers come first.
        segments: Vec<usize>,
    },
    /// A head that is damaged, or more or fewer bytes than it says.
    DamagedContainer {
        /// What is wrong with it.
        why: String,
    },
    /// Bytes between the segments that are not zero.
    DamagedPadding,
    /// A whole container under another one's name.
    OtherKey {
        /// The key that it holds.
        holds: String,
    },
    /// An object in a folder where no store looks for it.
    WrongFolder,
    /// A container of another release; stores leave it alone.
    UnknownVersion {
        /// The format's version.
        version: u16,
    },
    /// A file that no store named; stores leave it alone.
    ForeignName,
    /// A damaged container that a store set aside.
    Quarantined,
    /// What a put that broke off left behind, or one that is under way; removed at the next start.
    Leftover,
    /// A file or folder that could not be read.
    Unreadable {
        /// What the system said.
        why: String,
    },
}

impl Finding {
    /// Whether an object is lost to readers that ought to be there.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::DamagedSegments { .. }
                | Self::DamagedContainer { .. }
                | Self::DamagedPadding
                | Self::OtherKey { .. }
                | Self::WrongFolder
        )
    }
}

/// A file with something to be said of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Below the directory.
    pub path: PathBuf,
    /// Its length; 0 where that is not known.
    pub bytes: u64,
    /// What is the matter with it.
    #[serde(flatten)]
    pub finding: Finding,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Containers that are good to their last byte.
    pub good: u64,
    /// Bytes of all files among the objects.
    pub bytes: u64,
    /// Everything else, by path.
    pub findings: Vec<Found>,
}

impl Report {
    /// Whether something is damaged.
    pub fn is_damaged(&self) -> bool {
        self.findings.iter().any(|found| found.finding.is_damage())
    }

    /// Whether all could be read.
    pub fn is_complete(&self) -> bool {
        !self.findings.iter().any(|found| matches!(found.finding, Finding::Unreadable { .. }))
    }
}

/// A data directory whose files have been listed.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    objects: Vec<(PathBuf, u64)>,
    findings: Vec<Found>,
}

impl Directory {
    /// Lists a data directory. A store may be using it: what comes and goes meanwhile is no damage.
    ///
    /// # Errors
    /// It cannot be listed, or is no data directory.
    pub fn list(root: &Path) -> io::Result<Self> {
        let mut directory = Self { root: root.to_owned(), objects: Vec::new(), findings: Vec::new() };
        if !root.join("objects").is_dir() {
            fs::read_dir(root)?;
            let why = "has no folder `objects`: name the `data_dir` of a store";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        directory.note(root, |it, path| {
            let own = OWN_FILES.iter().any(|own| path == it.root.join(own));
            (!own).then_some(Finding::ForeignName)
        });
        directory.note(&root.join("temporary"), |_, _| Some(Finding::Leftover));
        directory.note(&root.join("quarantine"), |_, _| Some(Finding::Quarantined));
        let objects = root.join("objects");
        directory.note(&objects, |_, _| Some(Finding::ForeignName));
        for shelf in directory.entries(&objects) {
            if shelf.is_dir() {
                for path in directory.entries(&shelf) {
                    let bytes = fs::metadata(&path).map_or(0, |metadata| metadata.len());
                    directory.objects.push((path, bytes));
                }
            }
        }
        Ok(directory)
    }

    /// Bytes of all files among the objects.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Reads every object; `progress` hears how many bytes another file had, from several threads.
    pub fn check(self, progress: &(dyn Fn(u64) + Sync)) -> Report {
        let bytes = self.bytes();
        let next = AtomicUsize::new(0);
        let work = || {
            let (mut good, mut findings) = (0, Vec::new());
            while let Some((path, bytes)) = self.objects.get(next.fetch_add(1, Ordering::Relaxed)) {
                match check(path) {
                    Ok(found) if found.is_empty() => good += 1,
                    Ok(found) => findings.extend(found.into_iter().map(|it| (path, *bytes, it))),
                    // It has just been evicted or deleted.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => {
                        findings.push((path, *bytes, Finding::Unreadable { why: error.to_string() }));
                    }
                }
                progress(*bytes);
            }
            (good, findings)
        };
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let shares: Vec<_> = thread::scope(|scope| {
            let working: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            working
                .into_iter()
                .map(|it| it.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let mut report = Report { good: 0, bytes, findings: self.findings.clone() };
        for (good, findings) in shares {
            report.good += good;
            report.findings.extend(findings.into_iter().map(|(path, bytes, it)| self.found(path, bytes, it)));
        }
        report.findings.sort_by(|a, b| a.path.cmp(&b.path));
        report
    }

    fn found(&self, path: &Path, bytes: u64, finding: Finding) -> Found {
        Found { path: path.strip_prefix(&self.root).unwrap_or(path).to_owned(), bytes, finding }
    }

    /// Notes the files of a folder that are findings.
    fn note(&mut self, folder: &Path, finding: impl Fn(&Self, &Path) -> Option<Finding>) {
        for path in self.entries(folder) {
            let metadata = fs::metadata(&path).or_else(|_| fs::symlink_metadata(&path));
            let Ok(metadata) = metadata else { continue };
            if let Some(finding) = (!metadata.is_dir()).then(|| finding(self, &path)).flatten() {
                let found = self.found(&path, metadata.len(), finding);
                self.findings.push(found);
            }
        }
    }

    /// A folder's entries; that they cannot be read is a finding, that there is no folder is none.
    fn entries(&mut self, folder: &Path) -> Vec<PathBuf> {
        let listed = fs::read_dir(folder)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>());
        listed.unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                let found = self.found(folder, 0, Finding::Unreadable { why: error.to_string() });
                self.findings.push(found);
            }
            Vec::new()
        })
    }
}

/// All that is the matter with a file among the objects.
fn check(path: &Path) -> io::Result<Vec<Finding>> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Ok(vec![Finding::ForeignName]);
    }
    let head = match inspect::head(path, &file, metadata.len()) {
        Ok(head) => head,
        Err(Unusable::Name) => return Ok(vec![Finding::ForeignName]),
        Err(Unusable::Key(key)) => return Ok(vec![Finding::OtherKey { holds: key.to_string() }]),
        Err(Unusable::Format(FormatError::Version { found })) => {
            return Ok(vec![Finding::UnknownVersion { version: found }]);
        }
        Err(Unusable::Format(why)) => return Ok(vec![Finding::DamagedContainer { why: why.to_string() }]),
    };
    let mut findings = Vec::new();
    let shelf = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
    if shelf != Some(&head.key().to_string()[..2]) {
        findings.push(Finding::WrongFolder);
    }
    let mut segments = Vec::new();
    let (mut end, mut padded) = (head.bytes().len() as u64, true);
    for (index, entry) in head.segments().iter().enumerate() {
        padded &= is_zero(&file, end, entry.offset)?;
        end = entry.offset + entry.stored_len;
        match disk::read_part(&file, entry.offset, entry.stored_len as usize) {
            Ok(stored) => {
                if !is_good(&head, index, stored) {
                    segments.push(index);
                }
            }
            Err(error) => match Damage::from(error) {
                Damage::None(error) => return Err(error),
                Damage::Certain(_) | Damage::Gone => segments.push(index),
            },
        }
    }
    if !segments.is_empty() {
        findings.push(Finding::DamagedSegments { segments });
    }
    if !padded {
        findings.push(Finding::DamagedPadding);
    }
    Ok(findings)
}

fn is_good(head: &Head, index: usize, stored: Bytes) -> bool {
    let raw = head.decode_shared(index, stored);
    match head.segments()[index].kind {
        SegmentKind::Spans => raw.and_then(|raw| parse_spans(index, &raw)).is_ok(),
        SegmentKind::Layer | SegmentKind::Rank | SegmentKind::Ids => raw.is_ok(),
    }
}

/// Whether these bytes, fewer than 4096, are zero.
fn is_zero(file: &File, start: u64, end: u64) -> io::Result<bool> {
    let mut padding = vec![0; (end - start) as usize];
    file.read_exact_at(&mut padding, start)?;
    Ok(padding.iter().all(|&byte| byte == 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Chunk};

    fn check(dir: &Path) -> Report {
        Directory::list(dir).unwrap().check(&|_| {})
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
        let directory = Directory::list(dir.path()).unwrap();
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
        assert_eq!(Directory::list(&dir.path().join("nowhere")).unwrap_err().kind(), io::ErrorKind::NotFound);
        let why = Directory::list(dir.path()).unwrap_err().to_string();
        assert!(why.contains("objects"), "{why}");
    }
}
