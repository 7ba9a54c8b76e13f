//! A power loss behind every single step that a store makes on its disk, with what was not synced lost, cut short or
//! made zeros: a store opens on whatever is left, has all that was acknowledged, and serves nothing else.

use super::tape::{Dice, Image, Loss, Recording, Step, Tape, Told, left, materialize};
use crate::surface::Surface;
use crate::{Options, Store, open};
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, Codec, Dtype, KvShape, LayoutId, Parts, encode};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::put_response::Outcome;
use cacheclip_rpc::v1::{
    DeleteDocumentRequest, DeleteRequest, GetRequest, Hold, HoldRequest, MissReason, PutFrame, PutHead,
    StatRequest, kv_frame, put_frame,
};
use futures::future::join_all;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashSet};
use std::hash::{Hash as _, Hasher as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const LAYOUT: LayoutId = LayoutId::from_bytes([1; 32]);
const OBJECTS: u32 = 16;
const WRITERS: u32 = 4;
/// More than all objects need.
const ROOMY: u64 = 1 << 20;
const FRAME: usize = 3000;

/// Several share a folder.
fn key(n: u32) -> ChunkKey {
    let mut bytes = [0xee; 32];
    bytes[0] = (n % 5) as u8;
    bytes[1..5].copy_from_slice(&n.to_le_bytes());
    ChunkKey::from_bytes(bytes)
}

/// The object that a file would be served as.
fn number(path: &Path) -> Option<u32> {
    let name = path.strip_prefix("data/objects").ok()?.file_stem()?.to_str()?;
    let key: ChunkKey = name.parse().ok()?;
    Some(u32::from_le_bytes(std::array::from_fn(|i| key.as_bytes()[1 + i])))
}

fn container(n: u32) -> Bytes {
    let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 8 };
    let tokens = 5 + n % 7;
    let mut dice = Dice(n.into());
    let mut layer = || -> Vec<u8> {
        std::iter::repeat_with(|| dice.below(256) as u8)
            .take(shape.layer_bytes(tokens, Dtype::F16) as usize)
            .collect()
    };
    let layers = [layer(), layer()];
    let parts = Parts {
        layout: LAYOUT,
        key: key(n),
        shape,
        tokens,
        dtype: Dtype::F16,
        layers: layers.iter().map(Vec::as_slice).collect(),
        spans: None,
        rank: None,
    };
    encode(&parts, Codec::Raw).unwrap().into()
}

/// Memory where there is such a directory: what is replayed need not survive.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A store asked without a network between.
struct Machine {
    store: Store,
    client: CacheClient<Surface>,
}

impl Machine {
    async fn start(root: &Path, disk_bytes: u64) -> Result<Self, String> {
        // Without a RAM tier: what is read is what is on disk.
        let options = Options { data_dir: root.join("data"), disk_bytes, ram_bytes: 0, ..Options::default() };
        let store = open(options).await.map_err(|error| format!("no start: {error}"))?;
        let client = CacheClient::new(store.service());
        Ok(Self { store, client })
    }

    async fn put(&self, n: u32, tape: &Tape) {
        tape.tell(Told::Putting(n));
        if matches!(self.put_since(n, 0).await, Outcome::Stored | Outcome::Existed) {
            tape.tell(Told::Put(n));
        }
    }

    /// Puts what was computed since a generation.
    async fn put_since(&self, n: u32, generation: u64) -> Outcome {
        let (layout, key, bytes) = (id_bytes(LAYOUT.as_bytes()), id_bytes(key(n).as_bytes()), container(n));
        let head = PutHead { layout, key, bytes: bytes.len() as u64, generation, ..PutHead::default() };
        let data = (0..bytes.len()).step_by(FRAME).map(|at| bytes.slice(at..bytes.len().min(at + FRAME)));
        let frames: Vec<_> = std::iter::once(put_frame::Frame::Head(head))
            .chain(data.map(put_frame::Frame::Data))
            .map(|frame| PutFrame { frame: Some(frame) })
            .collect();
        self.client.clone().put(futures::stream::iter(frames)).await.unwrap().into_inner().outcome()
    }

    async fn hold(&self, document: u8, numbers: Range<u32>, tape: &Tape) {
        let keys = numbers.map(|n| id_bytes(key(n).as_bytes())).collect();
        let hold = Some(Hold { document: id_bytes(&[document; 32]), ttl_seconds: 0 });
        let request =
            HoldRequest { layout: id_bytes(LAYOUT.as_bytes()), keys, hold, ..HoldRequest::default() };
        self.client.clone().hold(request).await.unwrap();
        tape.tell(Told::Held(document));
    }

    async fn forget(&self, document: u8) {
        let request = DeleteDocumentRequest { document: id_bytes(&[document; 32]), keys: Vec::new() };
        self.client.clone().delete_document(request).await.unwrap();
    }

    async fn delete(&self, n: u32, tape: &Tape) {
        tape.tell(Told::Deleting(n));
        let (layout, keys) = (id_bytes(LAYOUT.as_bytes()), vec![id_bytes(key(n).as_bytes())]);
        self.client.clone().delete(DeleteRequest { layout, keys }).await.unwrap();
        tape.tell(Told::Deleted(n));
    }

    async fn get(&self, n: u32) -> Result<Vec<u8>, MissReason> {
        let (layout, key) = (id_bytes(LAYOUT.as_bytes()), id_bytes(key(n).as_bytes()));
        let mut frames = self.client.clone().get(GetRequest { layout, key }).await.unwrap().into_inner();
        let mut bytes = Vec::new();
        while let Some(frame) = frames.message().await.unwrap() {
            match frame.frame {
                Some(kv_frame::Frame::Data(data)) => bytes.extend_from_slice(&data),
                Some(kv_frame::Frame::Missing(_)) => return Err(frame_reason(&frame)),
                other => panic!("not a part of a container: {other:?}"),
            }
        }
        Ok(bytes)
    }
}

fn frame_reason(frame: &cacheclip_rpc::v1::KvFrame) -> MissReason {
    match frame.frame {
        Some(kv_frame::Frame::Missing(reason)) => reason.try_into().unwrap(),
        _ => MissReason::Unspecified,
    }
}

/// Several writers at once that put, delete and put again, each its own objects.
async fn work(machine: &Machine, tape: &Tape, seed: u64) {
    let writers = (0..WRITERS).map(|writer| async move {
        let mut dice = Dice(seed << 8 | u64::from(writer));
        for n in (writer..OBJECTS).step_by(WRITERS as usize) {
            machine.put(n, tape).await;
            if dice.below(3) == 0 {
                machine.delete(n, tape).await;
                if dice.below(2) == 0 {
                    machine.put(n, tape).await;
                }
            }
        }
    });
    join_all(writers).await;
}

/// One object is damaged on the medium, set aside when it is read, and brought again.
async fn damage_and_heal(machine: &Machine, tape: &Tape, root: &Path, n: u32) {
    machine.put(n, tape).await;
    let name = key(n).to_string();
    let path = root.join("data/objects").join(&name[..2]).join(format!("{name}.kv"));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(machine.get(n).await, Err(MissReason::Corrupt));
    machine.put(n, tape).await;
}

/// What clients have been promised.
#[derive(Clone, Debug, Default, Hash)]
struct Promised {
    there: BTreeSet<u32>,
    gone: BTreeSet<u32>,
}

fn promised(steps: &[Step]) -> Promised {
    let mut promised = Promised::default();
    // Evicted before its writer heard that it was stored.
    let mut evicted = BTreeSet::new();
    for step in steps {
        match step {
            Step::Told(Told::Putting(n)) => {
                promised.gone.remove(n);
                evicted.remove(n);
            }
            Step::Told(Told::Put(n)) if !evicted.contains(n) => drop(promised.there.insert(*n)),
            Step::Told(Told::Deleting(n)) => drop(promised.there.remove(n)),
            Step::Told(Told::Deleted(n)) => drop(promised.gone.insert(*n)),
            Step::Rename(_, to) if number(to).is_some() => evicted.retain(|n| number(to) != Some(*n)),
            // Evicted, or damaged and set aside: neither is promised to stay.
            Step::Remove(path) | Step::Rename(path, _) => {
                if let Some(n) = number(path) {
                    promised.there.remove(&n);
                    evicted.insert(n);
                }
            }
            _ => {}
        }
    }
    promised
}

/// Opens a store on an image and reads every object.
async fn check(image: &Image, promised: &Promised) -> Result<(), String> {
    let dir = scratch();
    materialize(image, dir.path()).unwrap();
    let machine = Machine::start(dir.path(), ROOMY).await?;
    for n in 0..OBJECTS {
        match machine.get(n).await {
            Ok(bytes) if bytes != container(n) => return Err(format!("object {n} is served corrupt")),
            Ok(_) if promised.gone.contains(&n) => return Err(format!("object {n} came back")),
            Err(reason) if promised.there.contains(&n) => {
                return Err(format!("object {n} is lost: {reason:?}"));
            }
            Err(MissReason::Corrupt) => {
                return Err(format!("object {n} has its name before it has its bytes"));
            }
            _ => {}
        }
    }
    let stat = machine.client.clone().stat(StatRequest {}).await.unwrap().into_inner();
    let files = |folder: &str| -> Vec<(PathBuf, u64)> {
        image_of(&dir.path().join("data").join(folder)).unwrap_or_default()
    };
    let used: u64 =
        ["objects", "temporary", "quarantine"].iter().flat_map(|folder| files(folder)).map(|it| it.1).sum();
    if stat.disk_used_bytes != used {
        return Err(format!("{} bytes are counted, there are {used}", stat.disk_used_bytes));
    }
    let leftovers = files("temporary");
    if leftovers.is_empty() { Ok(()) } else { Err(format!("not swept: {leftovers:?}")) }
}

/// Files below a folder with their sizes.
fn image_of(folder: &Path) -> std::io::Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        match entry.metadata()? {
            metadata if metadata.is_dir() => found.extend(image_of(&entry.path())?),
            metadata => found.push((entry.path(), metadata.len())),
        }
    }
    Ok(found)
}

/// Losses that are tried behind one step.
fn losses(seed: u64, at: usize) -> Vec<Loss> {
    let some = (0..3).map(|n| Loss::Some(Dice(seed << 32 | (at as u64) << 4 | n)));
    [Loss::Everything, Loss::Nothing].into_iter().chain(some).collect()
}

/// Behind how many steps the power is lost. Of the folders that a start makes in a row, all alike, behind every 32nd.
fn moments(steps: &[Step]) -> impl Iterator<Item = usize> {
    let alike = |end: usize| {
        let around = end.checked_sub(1).and_then(|before| steps.get(before..=end));
        matches!(around, Some([Step::CreateFolder(_), Step::CreateFolder(_)]))
    };
    (0..=steps.len()).filter(move |end| end.is_multiple_of(32) || !alike(*end))
}

/// Checks what is left behind each of these numbers of steps; how many different directories that were.
async fn replay(steps: &[Step], ends: impl Iterator<Item = usize>, seed: u64) -> usize {
    let mut seen = HashSet::new();
    for end in ends {
        let steps = &steps[..end];
        let promised = promised(steps);
        for loss in losses(seed, end) {
            let image = left(steps, loss);
            let mut hasher = DefaultHasher::new();
            (&image, &promised).hash(&mut hasher);
            if seen.insert(hasher.finish())
                && let Err(why) = check(&image, &promised).await
            {
                let last = names(&steps[end.saturating_sub(12)..]);
                panic!("{why}, with {loss:?} behind step {end} of seed {seed}; the last steps: {last:#?}");
            }
        }
    }
    seen.len()
}

async fn recorded(seed: u64, disk_bytes: u64) -> Vec<Step> {
    let dir = scratch();
    let recording = Recording::start(dir.path(), &[]);
    let machine = Machine::start(dir.path(), disk_bytes).await.unwrap();
    work(&machine, &recording.tape, seed).await;
    damage_and_heal(&machine, &recording.tape, dir.path(), 0).await;
    recording.tape.steps()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_loss_at_any_moment_takes_nothing_that_was_acknowledged() {
    let steps = recorded(1, ROOMY).await;
    let different = replay(&steps, moments(&steps), 1).await;
    assert!(
        different > moments(&steps).count() / 2,
        "{different} directories of {} steps: too few to mean much",
        steps.len()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_loss_of_a_full_store_brings_nothing_back_that_was_deleted() {
    let size = container(0).len() as u64;
    let steps = recorded(2, 6 * size).await;
    let evicted = steps.iter().any(|step| matches!(step, Step::Remove(path) if number(path).is_some()));
    assert!(evicted, "nothing was evicted");
    replay(&steps, moments(&steps).step_by(3), 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_store_had_not_synced_is_safe_once_its_successor_has_acknowledged_it() {
    let steps = recorded(3, ROOMY).await;
    for end in moments(&steps).step_by(11) {
        let dir = scratch();
        materialize(&left(&steps[..end], Loss::Nothing), dir.path()).unwrap();
        let recording = Recording::start(dir.path(), &steps[..end]);
        let machine = Machine::start(dir.path(), ROOMY).await.unwrap();
        // Objects that are there already are acknowledged without being written.
        for n in (0..OBJECTS).filter(|n| n % 3 != 0) {
            machine.put(n, &recording.tape).await;
        }
        for n in (0..OBJECTS).filter(|n| n % 3 == 0) {
            machine.delete(n, &recording.tape).await;
        }
        drop(machine);
        let steps = recording.tape.steps();
        replay(&steps, std::iter::once(steps.len()), 3).await;
    }
}

/// Chunks 0 to 3 are one document's, 3 to 5 another's; one after the other is deleted.
async fn documents(root: &Path) -> Vec<Step> {
    let recording = Recording::start(root, &[]);
    let (machine, tape) = (Machine::start(root, ROOMY).await.unwrap(), &recording.tape);
    for n in 0..6 {
        machine.put(n, tape).await;
    }
    machine.hold(1, 0..4, tape).await;
    machine.hold(2, 3..6, tape).await;
    for document in [1, 2] {
        tape.tell(Told::Forgetting(document));
        machine.forget(document).await;
        tape.tell(Told::Forgotten(document));
    }
    tape.steps()
}

/// Opens a store on an image and asks it what it knows of documents.
async fn check_documents(image: &Image, steps: &[Step]) -> Result<(), String> {
    let told = |what: Told| steps.iter().any(|step| matches!(step, Step::Told(it) if *it == what));
    let dir = scratch();
    materialize(image, dir.path()).unwrap();
    let machine = Machine::start(dir.path(), ROOMY).await?;
    let mut there = BTreeSet::new();
    for n in 0..6 {
        match machine.get(n).await {
            Ok(bytes) if bytes != container(n) => return Err(format!("object {n} is served corrupt")),
            Ok(_) => drop(there.insert(n)),
            Err(MissReason::Corrupt) => {
                return Err(format!("object {n} has its name before it has its bytes"));
            }
            Err(_) => {}
        }
    }
    let (forgotten, forgetting) = (told(Told::Forgotten(1)), told(Told::Forgetting(1)));
    let stay = if forgetting { 3..6 } else { 0..6 };
    if !told(Told::Forgetting(2))
        && let Some(lost) = stay.into_iter().find(|n| told(Told::Put(*n)) && !there.contains(n))
    {
        return Err(format!("object {lost} is lost"));
    }
    let gone = if told(Told::Forgotten(2)) { 0..6 } else { 0..if forgotten { 3 } else { 0 } };
    for n in gone {
        if there.contains(&n) {
            return Err(format!("object {n} came back"));
        }
        let outcome = machine.put_since(n, 1).await;
        if outcome != Outcome::Deleted {
            return Err(format!("object {n} was computed before it was deleted: {outcome:?}"));
        }
    }
    if told(Told::Held(2)) && !told(Told::Forgetting(2)) {
        machine.forget(2).await;
        // Claimed by the first document as well, until that is deleted.
        let shared = machine.get(3).await;
        if !forgetting && shared.is_err() {
            return Err(format!("the first document's claim is lost: {shared:?}"));
        }
        for n in if forgotten { 3..6 } else { 4..6 } {
            if machine.get(n).await.is_ok() {
                return Err(format!("the second document's claim on object {n} is lost"));
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_deletions_and_their_fence_outlive_a_power_loss_at_any_moment() {
    let dir = scratch();
    let steps = documents(dir.path()).await;
    let mut seen = HashSet::new();
    for end in moments(&steps) {
        let so_far = &steps[..end];
        for loss in losses(4, end) {
            let image = left(so_far, loss);
            let mut hasher = DefaultHasher::new();
            let told = so_far.iter().filter(|step| matches!(step, Step::Told(_))).count();
            (&image, told).hash(&mut hasher);
            if seen.insert(hasher.finish())
                && let Err(why) = check_documents(&image, so_far).await
            {
                panic!(
                    "{why}, with {loss:?} behind step {end}; the last: {:#?}",
                    names(&so_far[end.saturating_sub(12)..])
                );
            }
        }
    }
}

/// Steps in a few words: databases write whole pages.
fn names(steps: &[Step]) -> Vec<String> {
    steps
        .iter()
        .map(|step| match step {
            Step::Write { file, at, bytes } => format!("write {} bytes at {at} of file {file}", bytes.len()),
            step => format!("{step:?}"),
        })
        .collect()
}

/// The replay is no proof unless it finds what it looks for: each sync is left out once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_one_of_the_syncs_something_acknowledged_is_lost() {
    let dir = scratch();
    let recording = Recording::start(dir.path(), &[]);
    let machine = Machine::start(dir.path(), ROOMY).await.unwrap();
    machine.put(1, &recording.tape).await;
    machine.put(2, &recording.tape).await;
    machine.delete(1, &recording.tape).await;
    let steps = recording.tape.steps();
    let shelf = |n: u32| Path::new("data/objects").join(&key(n).to_string()[..2]);
    let without = |drop: &dyn Fn(usize, &Step) -> bool| -> Vec<Step> {
        let kept = steps.iter().enumerate().filter(|(at, step)| !drop(*at, step));
        kept.map(|(_, step)| step.clone()).collect()
    };
    let folder = |path: PathBuf| without(&move |_, step| matches!(step, Step::SyncFolder(it) if *it == path));
    let removed = steps.iter().position(|step| matches!(step, Step::Remove(path) if number(path) == Some(1)));
    let removed = removed.expect("a removal");
    let cases = [
        ("nothing", without(&|_, _| false), None),
        ("a file's bytes", without(&|_, step| matches!(step, Step::SyncFile(_))), Some("object 2 is lost")),
        ("an object's name", folder(shelf(2)), Some("object 2 is lost")),
        ("a folder of objects", folder("data/objects".into()), Some("object 2 is lost")),
        ("the folder of all objects", folder("data".into()), Some("object 2 is lost")),
        ("the data directory", folder("".into()), Some("object 2 is lost")),
        (
            "a removal",
            without(&|at, step| at > removed && matches!(step, Step::SyncFolder(_))),
            Some("object 1 came back"),
        ),
    ];
    for (what, steps, expected) in cases {
        let found = check(&left(&steps, Loss::Everything), &promised(&steps)).await;
        let found = found.err();
        let as_expected = match (&found, expected) {
            (None, None) => true,
            (Some(found), Some(expected)) => found.starts_with(expected),
            _ => false,
        };
        assert!(as_expected, "without the sync of {what}: {found:?} instead of {expected:?}");
    }
    drop(machine.store);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_waits_for_one_sync_of_its_file_and_one_of_its_shelf() {
    let dir = scratch();
    let recording = Recording::start(dir.path(), &[]);
    let machine = Machine::start(dir.path(), ROOMY).await.unwrap();
    let before = recording.tape.steps().len();
    machine.put(1, &recording.tape).await;
    let steps = recording.tape.steps().split_off(before);
    let received = |step: &Step| match step {
        Step::CreateFile(path, file) if path.starts_with("data/temporary") => Some(*file),
        _ => None,
    };
    let file = steps.iter().find_map(received).expect("a file");
    let synced = |step: &&Step| matches!(step, Step::SyncFile(it) if *it == file);
    assert_eq!(steps.iter().filter(synced).count(), 1);
    let folders: Vec<&Step> =
        steps.iter().filter(|step| matches!(step, Step::SyncFolder(_) | Step::CreateFolder(_))).collect();
    let shelf = Path::new("data/objects").join(&key(1).to_string()[..2]);
    assert!(matches!(&folders[..], [Step::SyncFolder(path)] if *path == shelf), "{folders:?}");
    drop(machine.store);
}

/// Sources of this crate as they are built for operation.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if !["tests.rs", "testing.rs", "power_loss.rs", "tape.rs", "volume.rs"]
            .contains(&name.as_str())
        {
            let text = std::fs::read_to_string(&path).unwrap();
            let built = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned();
            found.push((path, built));
        }
    }
    found
}

/// What is not recorded is not replayed.
#[test]
fn no_change_of_files_goes_past_what_is_recorded() {
    let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    assert!(sources.len() > 20, "{} files", sources.len());
    let changes = [
        "fs::rename",
        "fs::remove",
        "fs::create_dir",
        "fs::write",
        "fs::copy",
        "fs::hard_link",
        "File::create",
        "create_new(true",
        "append(true",
        "truncate(true",
        "set_len(",
        "write_at(",
        "write_all_at(",
        "Database::create",
    ];
    for (path, text) in sources {
        for (at, line) in text.lines().enumerate() {
            let change = changes.iter().find(|change| line.contains(*change));
            // Files' own operations, by the names of those of the system.
            let ours =
                ["volume::File::create", "fn write_at(", "!write_at("].iter().any(|it| line.contains(it));
            assert!(change.is_none() || ours, "{}:{}: {}", path.display(), at + 1, line.trim());
        }
    }
}
