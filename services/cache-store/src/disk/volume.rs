//! The changes that durability rests on, all in one place and as narrow as can be: what changes a name or a byte, and
//! what makes such changes outlive a power loss. Tests record them here and replay what a power loss could leave of
//! them; a change of the data directory that went past this module would not be proven.
//!
//! Outside tests these are the system's calls and nothing else.

#[cfg(test)]
use super::tape::{self, Track};
use redb::{Database, DatabaseError};
use rustix::fs::{Advice, fadvise};
use std::fs::{self, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::num::NonZeroU64;
use std::path::Path;

/// A change of names.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change<'a> {
    /// A new folder.
    CreateFolder(&'a Path),
    /// Another name for a file, in place of what had it.
    Rename(&'a Path, &'a Path),
    /// A name that is gone.
    Remove(&'a Path),
    /// All changes of names in this folder so far outlive a power loss.
    SyncFolder(&'a Path),
}

impl Change<'_> {
    fn make(self) -> io::Result<()> {
        let make = || match self {
            Self::CreateFolder(path) => fs::create_dir(path),
            Self::Rename(from, to) => fs::rename(from, to),
            Self::Remove(path) => fs::remove_file(path),
            Self::SyncFolder(path) => fs::File::open(path)?.sync_all(),
        };
        #[cfg(test)]
        let make = || tape::record(self, make);
        make()
    }
}

/// Gives a file another name, in place of what had it. Outlives a power loss once the new name's folder is synced;
/// until then either name may be left, or both, or, between two folders, none.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    Change::Rename(from, to).make()
}

/// Removes a file; that it is gone already is fine. Its name may come back until its folder is synced.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match Change::Remove(path).make() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes the names in a folder, and that others are gone, outlive a power loss.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    Change::SyncFolder(path).make()
}

/// Makes a folder and what is missing above it, to outlive a power loss.
pub(crate) fn create_folders(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = match path.parent() {
        Some(above) if above.as_os_str().is_empty() => Path::new("."),
        Some(above) => above,
        None => return Err(io::ErrorKind::NotFound.into()),
    };
    create_folders(above)?;
    match Change::CreateFolder(path).make() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        made => made?,
    }
    sync_folder(above)
}

/// Makes those that are missing of the folders of these names, to outlive a power loss: all of them for one sync of the
/// folder above them, which is there. A name that something else has stays with it.
pub(crate) fn create_folders_in(above: &Path, names: impl Iterator<Item = String>) -> io::Result<()> {
    let mut made = false;
    for name in names {
        match Change::CreateFolder(&above.join(name)).make() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            new => {
                new?;
                made = true;
            }
        }
    }
    if made { sync_folder(above) } else { Ok(()) }
}

/// Opens a database, or begins one.
pub(crate) fn database(path: &Path) -> Result<Database, DatabaseError> {
    let open = || Database::create(path);
    #[cfg(test)]
    let open = || tape::database(path, open);
    open()
}

/// A file that is written.
#[derive(Debug)]
pub(crate) struct File {
    file: fs::File,
    #[cfg(test)]
    track: Track,
}

impl File {
    /// Makes a file of a name that is free.
    pub(crate) fn create_new(path: &Path) -> io::Result<Self> {
        Self::open(path, OpenOptions::new().write(true).create_new(true))
    }

    fn open(path: &Path, options: &OpenOptions) -> io::Result<Self> {
        let open = || options.open(path);
        #[cfg(not(test))]
        let opened = Self { file: open()? };
        #[cfg(test)]
        let opened = tape::create(path, open).map(|(file, track)| Self { file, track })?;
        Ok(opened)
    }

    /// Has the system begin to write to the disk what it holds of these bytes, beside what comes next. Promises nothing:
    /// [`File::sync_all`] does, and tells what went wrong here.
    pub(crate) fn write_back(&self, offset: u64, len: u64) {
        // That they will not be needed soon is what the system can be told of them. It writes what it has not written
        // yet, and waits for none of it; a sync of each part would have the disk's cache flushed each time.
        let _ = fadvise(&self.file, offset, NonZeroU64::new(len), Advice::DontNeed);
    }

    /// Makes the file's bytes outlive a power loss; its name is another matter ([`sync_folder`]).
    pub(crate) fn sync_all(&mut self) -> io::Result<()> {
        let sync = || self.file.sync_all();
        #[cfg(test)]
        let sync = || self.track.sync(sync);
        sync()
    }
}

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let write = || (&self.file).write(bytes);
        #[cfg(test)]
        let write = || self.track.write(&self.file, bytes, write);
        write()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for File {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}
