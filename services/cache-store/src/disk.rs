//! Files: one per object, published by rename, plainly read.
//!
//! ```text
//! data_dir/lock                      held while a store uses the directory
//! data_dir/index.redb                cache of the catalogue
//! data_dir/journal.redb              claims, deletions and pins: truth, like the objects
//! data_dir/objects/<2 hex>/<key>.kv  published containers, on shelves that a start makes
//! data_dir/temporary/<n>             being received; removed at start
//! data_dir/quarantine/<key>.<n>      damaged containers, first to go when room is needed
//! ```
//!
//! What outlives a power loss: an object from the end of [`Disk::publish`] on, a removal from the end of
//! [`Disk::settle`] on, and from the end of [`Disk::open`] on all that was found there. A rename to the quarantine may
//! be undone: the damage is found again. Changes of the directory go through [`volume`], which shows that.

#[cfg(test)]
mod power_loss;
#[cfg(test)]
mod tape;
pub(crate) mod volume;

pub(crate) use volume::remove;

use crate::error::Error;
use bytes::Bytes;
use cacheclip_chunk::ChunkKey;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The data directory, locked.
#[derive(Debug)]
pub(crate) struct Disk {
    root: PathBuf,
    serial: AtomicU64,
    /// Folders in which removals may be undone by a power loss.
    unsettled: Mutex<BTreeSet<PathBuf>>,
    lock: Arc<File>,
}

/// A file being written; removed unless it is published.
#[derive(Debug)]
pub(crate) struct Temporary {
    path: PathBuf,
    pub(crate) file: volume::File,
    published: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published {
            // What cannot be removed now is removed at the next start.
            let _ = volume::remove(&self.path);
        }
    }
}

impl Disk {
    /// Makes what is missing of the directory, locks it, shows that it can be written, removes leftovers, and makes
    /// durable what is there.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |reason| Error::DataDir { path, reason }
        };
        for folder in ["objects", "temporary", "quarantine"] {
            volume::create_folders(&root.join(folder)).map_err(failed(root))?;
        }
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(root.join("lock"));
        let lock = lock.map_err(failed(root))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: root.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(failed(root)(source)),
        }
        let disk = Self {
            root: root.to_owned(),
            serial: AtomicU64::new(0),
            unsettled: Mutex::default(),
            lock: Arc::new(lock),
        };
        for (path, _) in files(&disk.temporary()).map_err(failed(root))? {
            volume::remove(&path).map_err(failed(&path))?;
        }
        drop(disk.create().map_err(failed(&disk.temporary()))?);
        disk.sync_names().map_err(failed(root))?;
        // No put has to make its shelf and wait for that to be durable.
        let names = (0..=u8::MAX).map(|first| format!("{first:02x}"));
        volume::create_folders_in(&root.join("objects"), names).map_err(failed(root))?;
        Ok(disk)
    }

    /// A predecessor that was killed may have left renames and removals that it had not synced yet. They are what this
    /// store finds and builds upon, so a power loss must not undo them any more.
    fn sync_names(&self) -> io::Result<()> {
        if let Some(above) = self.root.parent().filter(|above| !above.as_os_str().is_empty())
            && let Err(error) = volume::sync_folder(above)
        {
            // Where the root is a mount point, this is somebody else's folder.
            tracing::debug!(path = %above.display(), %error, "folder cannot be synced");
        }
        volume::sync_folder(&self.root)?;
        volume::sync_folder(&self.root.join("objects"))?;
        self.shelves()?.iter().try_for_each(|folder| volume::sync_folder(folder))
    }

    /// The folders of objects.
    fn shelves(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for folder in fs::read_dir(self.root.join("objects"))? {
            let folder = folder?;
            if folder.file_type()?.is_dir() {
                found.push(folder.path());
            }
        }
        Ok(found)
    }

    /// The directory's lock, for whoever else keeps files in it open.
    pub(crate) fn lock(&self) -> Arc<File> {
        Arc::clone(&self.lock)
    }

    #[cfg(test)]
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    fn temporary(&self) -> PathBuf {
        self.root.join("temporary")
    }

    fn object(&self, key: &ChunkKey) -> PathBuf {
        let name = key.to_string();
        self.root.join("objects").join(&name[..2]).join(format!("{name}.kv"))
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.root.join("journal.redb")
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.root.join("index.redb")
    }

    /// A new, empty file.
    pub(crate) fn create(&self) -> io::Result<Temporary> {
        let path = self.temporary().join(self.serial.fetch_add(1, Ordering::Relaxed).to_string());
        let file = volume::File::create_new(&path)?;
        Ok(Temporary { path, file, published: false })
    }

    /// Gives a file that has been synced its key's name, durably.
    pub(crate) fn publish(&self, mut temporary: Temporary, key: &ChunkKey) -> io::Result<()> {
        let path = self.object(key);
        let folder = path.parent().unwrap_or(&self.root);
        volume::create_folders(folder)?;
        volume::rename(&temporary.path, &path)?;
        temporary.published = true;
        volume::sync_folder(folder).inspect_err(|_| {
            // Nobody will know of it: its bytes must not stay. What cannot be removed is found at the next start.
            let _ = volume::remove(&path);
        })
    }

    /// An object's file, for who reads more than one part of it.
    pub(crate) fn open_object(&self, key: &ChunkKey) -> io::Result<File> {
        File::open(self.object(key))
    }

    /// Bytes of an object's file. [`io::ErrorKind::UnexpectedEof`] where it is shorter.
    pub(crate) fn read(&self, key: &ChunkKey, offset: u64, len: usize) -> io::Result<Bytes> {
        read_part(&self.open_object(key)?, offset, len)
    }

    /// Removes an object's file; that it is gone already is fine. A power loss may undo it until [`Disk::settle`].
    pub(crate) fn remove(&self, key: &ChunkKey) -> io::Result<()> {
        let path = self.object(key);
        volume::remove(&path)?;
        self.unsettle(&path);
        Ok(())
    }

    fn unsettle(&self, gone: &Path) {
        if let Some(folder) = gone.parent() {
            self.unsettled.lock().insert(folder.to_owned());
        }
    }

    /// Makes it durable that names are gone, those of evicted and damaged objects too: what is deleted may have been
    /// evicted before. To be called before a deletion is acknowledged.
    pub(crate) fn settle(&self) -> io::Result<()> {
        // Held until the last folder is synced: whoever comes meanwhile has to wait for it, too.
        let mut unsettled = self.unsettled.lock();
        while let Some(folder) = unsettled.first() {
            match volume::sync_folder(folder) {
                // A folder that other hands removed has nothing that could come back.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => unsettled.pop_first(),
            };
        }
        Ok(())
    }

    /// Moves a damaged file out of the way; its new path and its bytes.
    pub(crate) fn quarantine(&self, path: &Path) -> io::Result<(PathBuf, u64)> {
        let bytes = fs::metadata(path)?.len();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let free = (0u64..).map(|n| self.root.join("quarantine").join(format!("{stem}.{n}")));
        let Some(target) = free.into_iter().find(|target| !target.exists()) else {
            return Err(io::ErrorKind::AlreadyExists.into());
        };
        volume::rename(path, &target)?;
        self.unsettle(path);
        Ok((target, bytes))
    }

    /// Removes a damaged file; as [`Disk::remove`].
    pub(crate) fn remove_damaged(&self, path: &Path) -> io::Result<()> {
        volume::remove(path)?;
        self.unsettle(path);
        Ok(())
    }

    pub(crate) fn quarantine_object(&self, key: &ChunkKey) -> io::Result<(PathBuf, u64)> {
        self.quarantine(&self.object(key))
    }

    /// Damaged files that are kept, with their bytes.
    pub(crate) fn quarantined(&self) -> io::Result<Vec<(PathBuf, u64)>> {
        files(&self.root.join("quarantine"))
    }

    /// Paths of object files, and of what else lies among them, in no order.
    pub(crate) fn objects(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for folder in self.shelves()? {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    found.push(entry.path());
                }
            }
        }
        Ok(found)
    }
}

/// Bytes of a file. [`io::ErrorKind::UnexpectedEof`] where it is shorter.
pub(crate) fn read_part(file: &File, offset: u64, len: usize) -> io::Result<Bytes> {
    // The file bounds what is allocated, not the table.
    if file.metadata()?.len() < offset.saturating_add(len as u64) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes.into())
}

/// The key that a file's name begins with, that of an object or of a damaged one.
pub(crate) fn name(path: &Path) -> Option<ChunkKey> {
    path.file_stem()?.to_str()?.parse().ok()
}

fn files(folder: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_file() {
            found.push((entry.path(), metadata.len()));
        }
    }
    Ok(found)
}
