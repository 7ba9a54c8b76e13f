//! What a store can be told from outside.

use crate::index;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A store's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Listening addresses and limits.
    pub service: cacheclip_service::Options,
    /// Name of this node in placement and index: unique, and stable over restarts.
    pub node: String,
    /// Where others dial this node; absent: the address it listens on, which others can only dial if it is one.
    pub advertise: Option<String>,
    /// Who has which chunk, and who is there.
    #[serde(deserialize_with = "index::Options::deserialize_checked")]
    pub index: index::Options,
    /// Directory of the containers, made if absent; one store at a time may use it.
    pub data_dir: PathBuf,
    /// Most bytes of containers on disk, unfinished and quarantined ones included. Keep it below the volume's
    /// size: the index beside them needs some 200 bytes per container.
    pub disk_bytes: u64,
    /// Most bytes of containers in RAM. What reads in flight hold counts: where that is more, nothing else is kept.
    pub ram_bytes: u64,
    /// Object storage behind the disk: `s3://NAME/PREFIX`, `file:///DIRECTORY` or, to try it, `memory:///`; absent: there
    /// is none. The node's objects are below its name there, and nobody else may change them.
    pub bucket: Option<String>,
    /// Objects that may wait to be uploaded; one more is left to a later turn of the sweeper, while it is on disk.
    pub bucket_queue: usize,
    /// Longest wait for an answer of the bucket.
    pub bucket_timeout_seconds: f64,
    /// Largest container that is taken; more is an error of the request.
    pub max_object_bytes: u64,
    /// Containers received at the same time; each holds one segment in memory.
    pub concurrent_puts: usize,
    /// Segments that one request reads ahead of its client.
    pub read_ahead: usize,
    /// Longest time a client may take no frame, or bring none, before its request is given up.
    pub stall_seconds: f64,
    /// Bytes per second that the scrubber reads again to find damage; 0: it does not run.
    pub scrub_bytes_per_second: u64,
    /// Seconds from publication after which an object expires that no document claims; 0: it does not.
    pub ttl_seconds: u64,
    /// Seconds between two turns of the sweeper, which removes what has expired. Nothing is served after its time,
    /// removed or not.
    pub sweep_seconds: f64,
    /// Seconds for which deletions are remembered one by one. A write that began before the oldest that is
    /// remembered is refused whatever its key: make it longer than any writer takes.
    pub tombstone_seconds: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            service: cacheclip_service::Options::default(),
            node: "store".into(),
            advertise: None,
            index: index::Options::default(),
            data_dir: "data/cache-store".into(),
            disk_bytes: 16 << 30,
            ram_bytes: 1 << 30,
            bucket: None,
            bucket_queue: 1024,
            bucket_timeout_seconds: 5.0,
            max_object_bytes: 4 << 30,
            concurrent_puts: 4,
            read_ahead: 4,
            stall_seconds: 30.0,
            scrub_bytes_per_second: 32 << 20,
            ttl_seconds: 0,
            sweep_seconds: 60.0,
            tombstone_seconds: 30 * 24 * 3600,
        }
    }
}
