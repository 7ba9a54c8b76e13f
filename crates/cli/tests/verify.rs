//! `cacheclip verify` as a caller sees it: its exit code and its report.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use cacheclip_chunk::{ChunkKey, Codec, Dtype, Head, KvShape, LayoutId, Parts, encode};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn verify(place: impl AsRef<OsStr>, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cacheclip")).arg("verify").arg(place).args(more).output().unwrap()
}

/// Puts a container into a data directory; its path and its head.
fn lay(directory: &Path, n: u8) -> (PathBuf, Head) {
    let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 8 };
    let layer = vec![n; shape.layer_bytes(4, Dtype::F32) as usize];
    let parts = Parts {
        layout: LayoutId::from_bytes([1; 32]),
        key: ChunkKey::from_bytes([n; 32]),
        shape,
        tokens: 4,
        dtype: Dtype::F32,
        layers: vec![&layer; 2],
        spans: None,
        rank: None,
    };
    let bytes = encode(&parts, Codec::Raw).unwrap();
    let name = parts.key.to_string();
    let shelf = directory.join("objects").join(&name[..2]);
    fs::create_dir_all(&shelf).unwrap();
    let path = shelf.join(format!("{name}.kv"));
    fs::write(&path, &bytes).unwrap();
    (path, Head::parse(&bytes).unwrap())
}

#[test]
fn the_exit_code_says_whether_all_is_good_damaged_or_unread() {
    let dir = tempfile::tempdir().unwrap();
    lay(dir.path(), 1);
    let (path, head) = lay(dir.path(), 2);
    let good = verify(dir.path(), &[]);
    assert_eq!(good.status.code(), Some(0));
    assert!(String::from_utf8(good.stdout).unwrap().starts_with("2 containers are good"));

    let mut bytes = fs::read(&path).unwrap();
    bytes[head.segments()[1].offset as usize] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let damaged = verify(dir.path(), &["--json"]);
    assert_eq!(damaged.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&damaged.stdout).unwrap();
    assert_eq!(report["good"], 1);
    let found = json!([{
        "path": path.strip_prefix(dir.path()).unwrap(),
        "bytes": bytes.len(),
        "finding": "damaged_segments",
        "segments": [1],
    }]);
    assert_eq!(report["findings"], found);
    let told = String::from_utf8(verify(dir.path(), &[]).stdout).unwrap();
    assert!(told.contains("DAMAGED in segment 1"), "{told}");
    assert_eq!(fs::read(&path).unwrap(), bytes, "nothing is changed");

    let nowhere = verify(dir.path().join("nowhere"), &[]);
    assert_eq!(nowhere.status.code(), Some(2));
    let told = String::from_utf8(nowhere.stderr).unwrap();
    assert!(told.contains("nowhere") && told.lines().count() == 1, "{told}");
}

#[test]
fn a_bucket_is_checked_by_its_url() {
    let dir = tempfile::tempdir().unwrap();
    lay(dir.path(), 1);
    let (path, head) = lay(dir.path(), 2);
    // A node's part of a bucket has the shelves that a data directory has.
    let url = format!("file://{}/objects", dir.path().display());
    let good = verify(&url, &[]);
    assert_eq!(good.status.code(), Some(0), "{good:?}");
    assert!(String::from_utf8(good.stdout).unwrap().starts_with("2 containers are good"));

    let mut bytes = fs::read(&path).unwrap();
    bytes[head.segments()[1].offset as usize] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let damaged = verify(&url, &["--json"]);
    assert_eq!(damaged.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&damaged.stdout).unwrap();
    assert_eq!((&report["good"], &report["findings"][0]["segments"]), (&json!(1), &json!([1])));
    assert_eq!(report["findings"][0]["path"], json!(path.strip_prefix(dir.path().join("objects")).unwrap()));

    for (url, why) in [(format!("{url}/nowhere"), "no objects"), ("ftp://host/path".into(), "s3://")] {
        let nowhere = verify(&url, &[]);
        assert_eq!(nowhere.status.code(), Some(2));
        let told = String::from_utf8(nowhere.stderr).unwrap();
        assert!(told.contains(&url) && told.contains(why) && told.lines().count() == 1, "{told}");
    }
}
