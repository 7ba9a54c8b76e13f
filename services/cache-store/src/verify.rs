//! Checks a data directory or a bucket from outside, without a store and without changing anything.

mod bucket;

use crate::bucket::Objects;
use crate::inspect::{self, Source, Unusable};
use crate::read::Damage;
use bytes::Bytes;
use cacheclip_chunk::container::parse_spans;
use cacheclip_chunk::{FormatError, Head, SegmentKind};
use serde::Serialize;
use std::fs::{self, File};
use std::io;
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
    /// Below the directory or the URL.
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

/// Where containers are.
#[derive(Debug)]
enum Place {
    Directory(PathBuf),
    Bucket(Objects),
}

impl Place {
    /// A file, and its length; none where it is a folder.
    fn open(&self, path: &Path, bytes: u64) -> io::Result<Option<(Box<dyn Source>, u64)>> {
        match self {
            Self::Directory(_) => {
                let file = File::open(path)?;
                let metadata = file.metadata()?;
                Ok((!metadata.is_dir()).then(|| (Box::new(file) as _, metadata.len())))
            }
            Self::Bucket(objects) => Ok(Some((Box::new(objects.object(path)), bytes))),
        }
    }

    /// Files that are read side by side: by a processor each, or while the network is waited for.
    fn readers(&self) -> usize {
        match self {
            Self::Directory(_) => thread::available_parallelism().map_or(1, usize::from),
            Self::Bucket(_) => bucket::READERS,
        }
    }
}

/// A data directory or a bucket whose files have been listed.
#[derive(Debug)]
pub struct Listing {
    place: Place,
    objects: Vec<(PathBuf, u64)>,
    findings: Vec<Found>,
}

impl Listing {
    /// Lists a data directory. A store may be using it: what comes and goes meanwhile is no damage.
    ///
    /// # Errors
    /// It cannot be listed, or is no data directory.
    pub fn directory(root: &Path) -> io::Result<Self> {
        let place = Place::Directory(root.to_owned());
        let mut directory = Self { place, objects: Vec::new(), findings: Vec::new() };
        if !root.join("objects").is_dir() {
            fs::read_dir(root)?;
            let why = "has no folder `objects`: name the `data_dir` of a store";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        directory.note(root, |path| {
            let own = OWN_FILES.iter().any(|own| path == root.join(own));
            (!own).then_some(Finding::ForeignName)
        });
        directory.note(&root.join("temporary"), |_| Some(Finding::Leftover));
        directory.note(&root.join("quarantine"), |_| Some(Finding::Quarantined));
        let objects = root.join("objects");
        directory.note(&objects, |_| Some(Finding::ForeignName));
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

    /// Reads every object; `progress` hears how many bytes another file had, from several threads. Blocking.
    pub fn check(self, progress: &(dyn Fn(u64) + Sync)) -> Report {
        let bytes = self.bytes();
        let next = AtomicUsize::new(0);
        let work = || {
            let (mut good, mut findings) = (0, Vec::new());
            while let Some((path, bytes)) = self.objects.get(next.fetch_add(1, Ordering::Relaxed)) {
                match check(&self.place, path, *bytes) {
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
        let shares: Vec<_> = thread::scope(|scope| {
            let working: Vec<_> = (0..self.place.readers()).map(|_| scope.spawn(work)).collect();
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
        let path = match &self.place {
            Place::Directory(root) => path.strip_prefix(root).unwrap_or(path),
            Place::Bucket(_) => path,
        };
        Found { path: path.to_owned(), bytes, finding }
    }

    /// Notes the files of a folder that are findings.
    fn note(&mut self, folder: &Path, finding: impl Fn(&Path) -> Option<Finding>) {
        for path in self.entries(folder) {
            let metadata = fs::metadata(&path).or_else(|_| fs::symlink_metadata(&path));
            let Ok(metadata) = metadata else { continue };
            if let Some(finding) = (!metadata.is_dir()).then(|| finding(&path)).flatten() {
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
fn check(place: &Place, path: &Path, bytes: u64) -> io::Result<Vec<Finding>> {
    let Some((source, bytes)) = place.open(path, bytes)? else { return Ok(vec![Finding::ForeignName]) };
    let head = match inspect::head(path, &*source, bytes) {
        Ok(head) => head,
        Err(Unusable::Name) => return Ok(vec![Finding::ForeignName]),
        Err(Unusable::Key(key)) => return Ok(vec![Finding::OtherKey { holds: key.to_string() }]),
        Err(Unusable::Format(FormatError::Version { found })) => {
            return Ok(vec![Finding::UnknownVersion { version: found }]);
        }
        Err(Unusable::Format(why)) => return Ok(vec![Finding::DamagedContainer { why: why.to_string() }]),
        Err(Unusable::Read(error)) => {
            return match Damage::from(error) {
                Damage::None(error) => Err(error),
                Damage::Certain(why) => Ok(vec![Finding::DamagedContainer { why }]),
                Damage::Gone => Err(io::ErrorKind::NotFound.into()),
            };
        }
    };
    let mut findings = Vec::new();
    let shelf = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
    if shelf != Some(&head.key().to_string()[..2]) {
        findings.push(Finding::WrongFolder);
    }
    let mut segments = Vec::new();
    let (mut end, mut padded) = (head.bytes().len() as u64, true);
    for (index, entry) in head.segments().iter().enumerate() {
        // With what stands before it, to read once and not twice: in a bucket, reads cost a journey.
        let padding = (entry.offset - end) as usize;
        match source.part(end, padding + entry.stored_len as usize) {
            Ok(read) => {
                padded &= read[..padding].iter().all(|&byte| byte == 0);
                if !is_good(&head, index, read.slice(padding..)) {
                    segments.push(index);
                }
            }
            Err(error) => match Damage::from(error) {
                Damage::None(error) => return Err(error),
                Damage::Certain(_) => segments.push(index),
                Damage::Gone => return Err(io::ErrorKind::NotFound.into()),
            },
        }
        end = entry.offset + entry.stored_len;
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

#[cfg(test)]
mod tests;
