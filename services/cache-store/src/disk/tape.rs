//! What a store did to its files, in order, and what of it a power loss may leave.
//!
//! The model is harsher than file systems are. Bytes that were written after a file's last sync may be there, be
//! missing, be cut short or be zeros, one write independently of the other. Names that changed after their folder's
//! last sync may have changed or not, each on its own; a rename within one folder happens as a whole or not at all, one
//! between two folders is two changes. A file without a name is gone, and so is what lies in a folder without one.

#[path = "../../tests/common/dice.rs"]
mod dice;

pub(super) use dice::Dice;

use super::volume::Change;
use bytes::Bytes;
use parking_lot::Mutex;
use redb::{Builder, Database, DatabaseError, StorageBackend};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Seek as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One step of a recording. Paths are relative to the recorded directory, which itself is there to stay.
#[derive(Clone, Debug)]
pub(super) enum Step {
    CreateFolder(PathBuf),
    CreateFile(PathBuf, usize),
    Write {
        file: usize,
        at: u64,
        bytes: Bytes,
    },
    SetLen {
        file: usize,
        len: u64,
    },
    SyncFile(usize),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    SyncFolder(PathBuf),
    /// What a client began or was told meanwhile.
    Told(Told),
}

/// What clients begin and are told, by the number of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    Putting(u32),
    Put(u32),
    Deleting(u32),
    Deleted(u32),
    /// A document's claims.
    Held(u8),
    /// A document's deletion.
    Forgetting(u8),
    Forgotten(u8),
}

/// A recording that goes on.
#[derive(Clone, Debug, Default)]
pub(super) struct Tape(Arc<Mutex<Vec<Step>>>);

/// The directories that are recorded. A store finds its tape by the paths that it changes, so that nothing but this
/// module knows that there are tapes.
static RECORDED: Mutex<Vec<(PathBuf, Tape)>> = Mutex::new(Vec::new());

/// Records a directory for as long as it is kept.
#[derive(Debug)]
pub(super) struct Recording {
    root: PathBuf,
    pub(super) tape: Tape,
}

impl Recording {
    /// Goes on with what was recorded `before`, of which the directory must be what it led to.
    pub(super) fn start(root: &Path, before: &[Step]) -> Self {
        let tape = Tape(Arc::new(Mutex::new(before.to_vec())));
        RECORDED.lock().push((root.to_owned(), tape.clone()));
        Self { root: root.to_owned(), tape }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDED.lock().retain(|(root, _)| *root != self.root);
    }
}

impl Tape {
    pub(super) fn tell(&self, told: Told) {
        self.0.lock().push(Step::Told(told));
    }

    pub(super) fn steps(&self) -> Vec<Step> {
        self.0.lock().clone()
    }

    /// Does a step and keeps it where it succeeded, as one: what is kept is in the order in which it happened.
    fn step<R>(&self, make: impl FnOnce() -> io::Result<R>, step: impl FnOnce(&R) -> Step) -> io::Result<R> {
        let mut steps = self.0.lock();
        let made = make()?;
        steps.push(step(&made));
        Ok(made)
    }
}

/// The tape of the directory that a path lies in, and the path within it.
fn tape_of(path: &Path) -> Option<(Tape, PathBuf)> {
    let recorded = RECORDED.lock();
    recorded.iter().find_map(|(root, tape)| Some((tape.clone(), path.strip_prefix(root).ok()?.to_owned())))
}

/// Makes a change of names.
pub(super) fn record(change: Change<'_>, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let (Change::CreateFolder(path)
    | Change::Rename(path, _)
    | Change::Remove(path)
    | Change::SyncFolder(path)) = change;
    let Some((tape, path)) = tape_of(path) else { return make() };
    tape.step(make, |()| match change {
        Change::CreateFolder(_) => Step::CreateFolder(path),
        Change::Rename(_, to) => Step::Rename(path, tape_of(to).map(|(_, to)| to).unwrap_or_default()),
        Change::Remove(_) => Step::Remove(path),
        Change::SyncFolder(_) => Step::SyncFolder(path),
    })
}

/// Makes a new file.
pub(super) fn create(
    path: &Path,
    open: impl FnOnce() -> io::Result<fs::File>,
) -> io::Result<(fs::File, Track)> {
    let Some((tape, path)) = tape_of(path) else { return Ok((open()?, Track(None))) };
    let mut steps = tape.0.lock();
    let opened = open()?;
    let file = steps.iter().filter(|step| matches!(step, Step::CreateFile(..))).count();
    steps.push(Step::CreateFile(path, file));
    drop(steps);
    Ok((opened, Track(Some((tape, file)))))
}

/// Opens a database whose file is recorded, or one like all others.
pub(super) fn database(
    path: &Path,
    unrecorded: impl FnOnce() -> Result<Database, DatabaseError>,
) -> Result<Database, DatabaseError> {
    let Some((tape, name)) = tape_of(path) else { return unrecorded() };
    let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let (file, track) = match path.exists() {
        false => create(path, open)?,
        true => match follow(&tape.0.lock()).names.get(&name) {
            Some(Node::File(id)) => (open()?, Track(Some((tape.clone(), *id)))),
            _ => return unrecorded(),
        },
    };
    Builder::new().create_with_backend(Recorded { file, track })
}

/// A database's file. Its directory's lock is lock enough.
#[derive(Debug)]
struct Recorded {
    file: fs::File,
    track: Track,
}

impl StorageBackend for Recorded {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.track.step(|file| Step::SetLen { file, len }, || self.file.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.track.sync(|| self.file.sync_data())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let write = |file| Step::Write { file, at, bytes: Bytes::copy_from_slice(bytes) };
        self.track.step(write, || self.file.write_all_at(bytes, at))
    }
}

/// Where the changes of an open file are kept, if its directory is recorded.
#[derive(Debug)]
pub(super) struct Track(Option<(Tape, usize)>);

impl Track {
    pub(super) fn sync(&self, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.step(Step::SyncFile, make)
    }

    fn step(
        &self,
        step: impl FnOnce(usize) -> Step,
        make: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let Some((tape, file)) = &self.0 else { return make() };
        tape.step(make, |()| step(*file))
    }

    pub(super) fn write(
        &self,
        mut file: &fs::File,
        bytes: &[u8],
        make: impl FnOnce() -> io::Result<usize>,
    ) -> io::Result<usize> {
        let Some((tape, id)) = &self.0 else { return make() };
        let at = file.stream_position()?;
        tape.step(make, |len| Step::Write { file: *id, at, bytes: Bytes::copy_from_slice(&bytes[..*len]) })
    }
}

/// A directory as it may be found: folders, and files with their bytes.
pub(super) type Image = BTreeMap<PathBuf, Option<Vec<u8>>>;

/// How much of what was not synced a power loss takes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Loss {
    /// Nothing: the process was killed, the machine runs on.
    Nothing,
    Everything,
    /// This and that.
    Some(Dice),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Folder,
    File(usize),
}

/// One change of names that a power loss takes or leaves as a whole.
#[derive(Clone, Debug)]
struct Effect {
    /// Whose sync makes it durable.
    folder: PathBuf,
    gone: Option<PathBuf>,
    comes: Option<(PathBuf, Node)>,
    durable: bool,
}

impl Effect {
    fn comes(path: &Path, node: Node) -> Self {
        Self { folder: above(path), gone: None, comes: Some((path.to_owned(), node)), durable: false }
    }

    fn goes(path: &Path) -> Self {
        Self { folder: above(path), gone: Some(path.to_owned()), comes: None, durable: false }
    }
}

fn above(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_owned()
}

/// What a power loss behind these steps leaves.
pub(super) fn left(steps: &[Step], loss: Loss) -> Image {
    let mut dice = match loss {
        Loss::Some(dice) => dice,
        Loss::Nothing | Loss::Everything => Dice(0),
    };
    let Followed { effects, writes, .. } = follow(steps);
    let kept = |dice: &mut Dice| match loss {
        Loss::Nothing => true,
        Loss::Everything => false,
        Loss::Some(_) => dice.below(2) == 0,
    };
    let mut names = BTreeMap::new();
    for effect in effects {
        if effect.durable || kept(&mut dice) {
            if let Some(path) = &effect.gone {
                names.remove(path);
            }
            names.extend(effect.comes);
        }
    }
    let contents: Vec<Vec<u8>> = writes.iter().map(|writes| content(writes, loss, &mut dice)).collect();
    let mut image = Image::new();
    for (path, node) in names {
        let above = above(&path);
        // Names come sorted: what is above them has been seen.
        if above.as_os_str().is_empty() || matches!(image.get(&above), Some(None)) {
            let bytes = match node {
                Node::Folder => None,
                Node::File(file) => Some(contents[file].clone()),
            };
            image.insert(path, bytes);
        }
    }
    image
}

/// A change of a file's bytes.
#[derive(Clone, Debug)]
enum Written {
    At(u64, Bytes),
    Len(u64),
}

/// With whether they are durable.
type Writes = Vec<(Written, bool)>;

/// What steps come to.
struct Followed {
    effects: Vec<Effect>,
    /// Per file.
    writes: Vec<Writes>,
    /// As the machine that runs on sees them.
    names: BTreeMap<PathBuf, Node>,
}

fn follow(steps: &[Step]) -> Followed {
    let mut seen: BTreeMap<PathBuf, Node> = BTreeMap::new();
    let mut effects: Vec<Effect> = Vec::new();
    let mut writes: Vec<Writes> = Vec::new();
    for step in steps {
        match step {
            Step::CreateFolder(path) => {
                seen.insert(path.clone(), Node::Folder);
                effects.push(Effect::comes(path, Node::Folder));
            }
            Step::CreateFile(path, file) => {
                writes.resize_with(file + 1, Vec::new);
                seen.insert(path.clone(), Node::File(*file));
                effects.push(Effect::comes(path, Node::File(*file)));
            }
            Step::Write { file, at, bytes } => {
                writes[*file].push((Written::At(*at, bytes.clone()), false));
            }
            Step::SetLen { file, len } => writes[*file].push((Written::Len(*len), false)),
            Step::SyncFile(file) => writes[*file].iter_mut().for_each(|write| write.1 = true),
            Step::Rename(from, to) => {
                // Files that are not written here, like a database's, have no content to follow.
                let Some(node) = seen.remove(from) else { continue };
                seen.insert(to.clone(), node);
                let (goes, comes) = (Effect::goes(from), Effect::comes(to, node));
                if goes.folder == comes.folder {
                    effects.push(Effect { gone: goes.gone, ..comes });
                } else {
                    effects.extend([comes, goes]);
                }
            }
            Step::Remove(path) => {
                seen.remove(path);
                effects.push(Effect::goes(path));
            }
            Step::SyncFolder(path) => {
                effects
                    .iter_mut()
                    .filter(|effect| effect.folder == *path)
                    .for_each(|effect| effect.durable = true);
            }
            Step::Told(_) => {}
        }
    }
    Followed { effects, writes, names: seen }
}

fn content(writes: &Writes, loss: Loss, dice: &mut Dice) -> Vec<u8> {
    let mut content = Vec::new();
    for (written, durable) in writes {
        // What is lost is drawn for durable writes too: the same seed then loses the same of the others.
        let (fate, part) = (dice.below(5), dice.below(1 << 32));
        let fate = match loss {
            _ if *durable => Fate::Kept,
            Loss::Nothing => Fate::Kept,
            Loss::Everything => Fate::Lost,
            Loss::Some(_) => [Fate::Lost, Fate::Short, Fate::Zeros, Fate::Kept, Fate::Kept][fate as usize],
        };
        match (written, fate) {
            (_, Fate::Lost) => {}
            (Written::Len(len), _) => content.resize(*len as usize, 0),
            (Written::At(at, bytes), fate) => {
                let at = *at as usize;
                // Zeros are for blocks that are new: one that was written before has its old bytes or its new ones.
                if matches!(fate, Fate::Zeros) && at + bytes.len() <= content.len() {
                    continue;
                }
                let keep = match fate {
                    Fate::Short => (part % (bytes.len() as u64 + 1)) as usize,
                    _ => bytes.len(),
                };
                content.resize(content.len().max(at + keep), 0);
                match fate {
                    Fate::Zeros => content[at..at + keep].fill(0),
                    _ => content[at..at + keep].copy_from_slice(&bytes[..keep]),
                }
            }
        }
    }
    content
}

/// What becomes of a write.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Kept,
    Lost,
    Short,
    Zeros,
}

/// Makes a directory what an image says.
pub(super) fn materialize(image: &Image, root: &Path) -> io::Result<()> {
    for (path, bytes) in image {
        match bytes {
            None => fs::create_dir(root.join(path))?,
            Some(bytes) => fs::write(root.join(path), bytes)?,
        }
    }
    Ok(())
}
