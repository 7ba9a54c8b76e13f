//! Objects for tests that look into a store from within.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use crate::options::Options;
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, Codec, Dtype, Head, KvShape, LayoutId, Parts, encode};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// A container, and its head.
#[derive(Clone, Debug)]
pub(crate) struct Chunk {
    pub(crate) key: ChunkKey,
    pub(crate) head: Head,
    pub(crate) bytes: Bytes,
}

/// A container of three layers; a different one for every number.
pub(crate) fn chunk(n: u32) -> Chunk {
    let shape = KvShape { layers: 3, kv_heads: 2, head_dim: 8 };
    let mut key = [0xee; 32];
    key[..4].copy_from_slice(&n.to_le_bytes());
    let layer = vec![n as u8; shape.layer_bytes(20, Dtype::F16) as usize];
    let parts = Parts {
        layout: LayoutId::from_bytes([1; 32]),
        key: ChunkKey::from_bytes(key),
        shape,
        tokens: 20,
        dtype: Dtype::F16,
        layers: vec![&layer; 3],
        spans: None,
        rank: None,
    };
    let bytes = Bytes::from(encode(&parts, Codec::Raw).unwrap());
    Chunk { key: parts.key, head: Head::parse(&bytes).unwrap(), bytes }
}

pub(crate) fn options(dir: &Path) -> Options {
    Options { data_dir: dir.to_owned(), disk_bytes: 1 << 20, ram_bytes: 1 << 20, ..Options::default() }
}

/// Where a chunk's file is in a data directory.
pub(crate) fn path(dir: &Path, key: &ChunkKey) -> PathBuf {
    let name = key.to_string();
    dir.join("objects").join(&name[..2]).join(format!("{name}.kv"))
}

/// Puts a chunk's file into a data directory that no store uses yet.
pub(crate) fn lay(dir: &Path, chunk: &Chunk) -> PathBuf {
    let path = path(dir, &chunk.key);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, &chunk.bytes).unwrap();
    path
}

/// Flips a bit of a file.
pub(crate) fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}
