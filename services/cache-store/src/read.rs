//! Reading objects, from RAM or disk, verified on the way from disk.

use crate::core::Core;
use crate::metrics;
use crate::ram::Resident;
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, ContainerHash, Head, LayoutId, SegmentKind};
use cacheclip_rpc::v1::{MissReason, Tier};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// An object that a request reads.
#[derive(Clone, Debug)]
pub(crate) struct Opened {
    pub(crate) object: Arc<Resident>,
    pub(crate) tier: Tier,
}

impl Core {
    /// Opens an object for layers `range` (an end of 0 means all) and what comes with them. Blocking.
    pub(crate) fn open_object(
        &self,
        layout: LayoutId,
        key: &ChunkKey,
        range: &Range<u32>,
    ) -> Result<Opened, MissReason> {
        metrics::requested();
        let record = {
            let mut catalogue = self.catalogue.lock();
            let record = catalogue.find(layout, key)?;
            catalogue.touch(key);
            record
        };
        let resident = self.ram.lock().get(key).filter(|object| object.head.hash() == record.hash);
        let object = match resident {
            Some(object) => object,
            None => {
                let bytes = self.read(key, 0, record.head_len, |bytes| {
                    let head = Head::parse(bytes).map_err(|error| error.to_string())?;
                    (head.hash() == record.hash)
                        .then_some(())
                        .ok_or_else(|| "its head is not the one that was published".to_owned())
                });
                let bytes = bytes.map_err(|damage| self.miss(key, record.hash, damage))?;
                let head = Head::parse(&bytes).map_err(|_| MissReason::Corrupt)?;
                let object = Arc::new(Resident::new(head));
                self.ram.lock().insert(Arc::clone(&object));
                self.gauge();
                object
            }
        };
        if range.end > object.head.shape().layers {
            return Err(MissReason::Layout);
        }
        let in_ram = object.has(wanted(&object.head, range).into_iter());
        let tier = if in_ram { Tier::StoreRam } else { Tier::StoreDisk };
        metrics::hit(if in_ram { metrics::RAM } else { metrics::DISK });
        Ok(Opened { object, tier })
    }

    /// A segment's stored bytes, verified. Blocking.
    pub(crate) fn segment(&self, object: &Resident, index: usize) -> Result<Bytes, MissReason> {
        if let Some(stored) = object.segment(index) {
            return Ok(stored);
        }
        let head = &object.head;
        let key = head.key();
        let entry = head.segments().get(index).ok_or(MissReason::Corrupt)?;
        let stored = self.read(&key, entry.offset, entry.stored_len as usize, |stored| {
            head.verify_segment(index, stored).map_err(|error| error.to_string())
        });
        let stored = stored.map_err(|damage| self.miss(&key, head.hash(), damage))?;
        object.fill(index, stored.clone());
        Ok(stored)
    }

    fn read(
        &self,
        key: &ChunkKey,
        offset: u64,
        len: usize,
        verify: impl FnOnce(&[u8]) -> Result<(), String>,
    ) -> Result<Bytes, Damage> {
        let bytes = self.disk.read(key, offset, len).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Damage::Certain("it is cut off".into()),
            io::ErrorKind::NotFound => Damage::Gone,
            _ if error.raw_os_error() == Some(EIO) => Damage::Certain(error.to_string()),
            // Too many open files, say: nothing is wrong with the object.
            _ => Damage::None(error),
        })?;
        verify(&bytes).map_err(Damage::Certain)?;
        Ok(bytes)
    }

    /// What a failed read means to the reader; sets the object aside where it is to blame.
    fn miss(&self, key: &ChunkKey, container: ContainerHash, damage: Damage) -> MissReason {
        match damage {
            Damage::None(error) => {
                tracing::error!(%key, %error, "object cannot be read now");
                return MissReason::Unavailable;
            }
            Damage::Certain(why) => self.set_aside(key, container, &why),
            // Evicted or deleted while it was read, or removed by other hands.
            Damage::Gone => self.set_aside(key, container, &"its file is gone"),
        }
        let catalogue = self.catalogue.lock();
        match catalogue.record(key) {
            // Another container has taken its place: the reader may simply ask again.
            Some(_) => MissReason::Unavailable,
            None => catalogue.reason(key),
        }
    }
}

/// The medium's own word that it cannot read what it wrote.
const EIO: i32 = 5;

/// What a failed read says about the object.
enum Damage {
    /// Nothing: the process lacks something.
    None(io::Error),
    /// It is not what was published.
    Certain(String),
    /// It has no file.
    Gone,
}

/// Segments that a read of layers brings: spans and rank first, because they are small and planning starts with
/// them, then the layers.
pub(crate) fn wanted(head: &Head, range: &Range<u32>) -> Vec<usize> {
    let end = if range.end == 0 { head.shape().layers } else { range.end };
    let extras = [SegmentKind::Spans, SegmentKind::Rank].into_iter().filter_map(|kind| head.segment_of(kind));
    extras.chain((range.start..end).filter_map(|layer| head.layer_segment(layer).ok())).collect()
}
