//! The golden vectors and files: what other implementations, and later releases of this one, must reproduce.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use bytes::Bytes;
use cacheclip_chunk::{
    AnchorId, ByteSpan, ChunkKey, Codec, Container, DocumentId, Dtype, FormatError, Head, KEY_SPEC, KvShape,
    LayoutSpec, Llama3Scaling, Parts, Rank, RopeSpec, Scope, ScopeSecret, encode, encode_with_ids,
    text_digest,
};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

const IDS: [u32; TOKENS as usize] = [10, 11, 12, 13, 14];
const TOKENS: u32 = 5;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn specs() -> [LayoutSpec; 2] {
    let plain = LayoutSpec {
        weights: [0x11; 32],
        adapter: None,
        tokenizer: [0x22; 32],
        rope: RopeSpec { theta: 10_000.0, scaling: None },
        shape: KvShape { layers: 2, kv_heads: 2, head_dim: 8 },
        dtype: Dtype::F32,
    };
    let scaling = Llama3Scaling {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192,
    };
    let scaled = LayoutSpec {
        adapter: Some([0x33; 32]),
        rope: RopeSpec { theta: 500_000.0, scaling: Some(scaling) },
        dtype: Dtype::Bf16,
        ..plain.clone()
    };
    [plain, scaled]
}

fn layout_json(spec: &LayoutSpec) -> Value {
    let scaling = spec.rope.scaling.map(|it| {
        json!({"factor": it.factor, "low_freq_factor": it.low_freq_factor,
            "high_freq_factor": it.high_freq_factor, "original_max_position": it.original_max_position})
    });
    json!({"weights": hex(&spec.weights), "adapter": spec.adapter.map(|it| hex(&it)),
        "tokenizer": hex(&spec.tokenizer), "theta": spec.rope.theta, "scaling": scaling,
        "layers": spec.shape.layers, "kv_heads": spec.shape.kv_heads, "head_dim": spec.shape.head_dim,
        "dtype": spec.dtype.name(), "id": spec.id().to_string()})
}

fn keys() -> Value {
    let layouts = specs();
    let anchor_ids: [&[u32]; 3] = [&[], &[1], &[1, 128_000, u32::MAX]];
    let chunk_ids: [&[u32]; 3] = [&[0], &[17, 4, 99, 3, 2], &[1, 128_000, u32::MAX]];
    let secret_key: [u8; 32] = std::array::from_fn(|i| i as u8);
    let secret = ScopeSecret::new(7, secret_key);
    let mut scopes = Vec::new();
    let mut digests = Vec::new();
    let mut documents = Vec::new();
    for (kind, name, salt) in
        [("tenant", "acme", ""), ("corpus", "acme", ""), ("tenant", "café", "project-9")]
    {
        let scope = if kind == "tenant" { Scope::Tenant(name) } else { Scope::Corpus(name) };
        let scope = secret.scope(scope, salt);
        scopes.push(json!({"key_id": secret.key_id(), "key": hex(&secret_key), "kind": kind, "name": name,
            "salt": salt, "id": scope.to_string()}));
        for text in ["", "Doc: the mill stands north of the river — since 1804."] {
            digests.push(
                json!({"scope": scope.to_string(), "text": text, "digest": hex(&text_digest(&scope, text))}),
            );
        }
    }
    let acme = secret.scope(Scope::Tenant("acme"), "");
    for (scope, name) in [
        (acme, "handbook.txt"),
        (acme, "für/2 — a.txt"),
        (secret.scope(Scope::Tenant("acme"), "s"), "handbook.txt"),
    ] {
        let id = DocumentId::new(&scope, name);
        documents.push(json!({"scope": scope.to_string(), "name": name, "id": id.to_string()}));
    }
    let mut anchors = Vec::new();
    let mut chunk_keys = Vec::new();
    let scope = acme;
    for layout in layouts.iter().map(LayoutSpec::id) {
        for (anchor_ids, ids) in anchor_ids.into_iter().zip(chunk_ids) {
            let anchor = AnchorId::new(&layout, anchor_ids);
            anchors.push(json!({"layout": layout.to_string(), "ids": anchor_ids, "id": anchor.to_string()}));
            let key = ChunkKey::new(&layout, &anchor, &scope, ids);
            chunk_keys.push(json!({"layout": layout.to_string(), "anchor": anchor.to_string(),
                "scope": scope.to_string(), "ids": ids, "key": key.to_string()}));
        }
    }
    json!({"key_spec": KEY_SPEC, "layouts": layouts.iter().map(layout_json).collect::<Vec<_>>(),
        "anchors": anchors, "scopes": scopes, "chunk_keys": chunk_keys, "text_digests": digests,
        "documents": documents})
}

/// The parts of a golden container: values of a narrow range, so that byte planes compress.
struct Sample {
    spec: LayoutSpec,
    layers: Vec<Vec<u8>>,
    spans: Option<Vec<ByteSpan>>,
    ranks: Option<Vec<u8>>,
    ids: Option<Vec<u32>>,
}

impl Sample {
    fn new(spec: LayoutSpec) -> Self {
        let elements = spec.shape.layer_bytes(TOKENS, spec.dtype) as usize / spec.dtype.size();
        let layer = |layer: usize| match spec.dtype {
            Dtype::F32 => {
                (0..elements).flat_map(|i| ((i * 3 + layer) as f32 / 64.0 - 1.0).to_le_bytes()).collect()
            }
            Dtype::F16 | Dtype::Bf16 => {
                (0..elements).flat_map(|i| (0x3f80 + (i * 7 + layer) as u16 % 100).to_le_bytes()).collect()
            }
        };
        Self {
            layers: (0..spec.shape.layers as usize).map(layer).collect(),
            spans: Some((0..TOKENS).map(|i| ByteSpan { start: 4 * i, end: 4 * i + 3 }).collect()),
            ranks: Some((0..TOKENS as u8).map(|i| 250 - 50 * i).collect()),
            ids: None,
            spec,
        }
    }

    /// As auxiliary KV is: with the token ids, and here without anything else.
    fn with_ids(spec: LayoutSpec) -> Self {
        Self { spans: None, ranks: None, ids: Some(IDS.to_vec()), ..Self::new(spec) }
    }

    fn encoded(&self, codec: Codec) -> Vec<u8> {
        match &self.ids {
            Some(ids) => encode_with_ids(&self.parts(), ids, codec).unwrap(),
            None => encode(&self.parts(), codec).unwrap(),
        }
    }

    fn key(&self) -> ChunkKey {
        let layout = self.spec.id();
        let scope = ScopeSecret::new(1, [9; 32]).scope(Scope::Corpus("golden"), "");
        ChunkKey::new(&layout, &AnchorId::new(&layout, &[1]), &scope, &IDS)
    }

    fn parts(&self) -> Parts<'_> {
        Parts {
            layout: self.spec.id(),
            key: self.key(),
            shape: self.spec.shape,
            tokens: TOKENS,
            dtype: self.spec.dtype,
            layers: self.layers.iter().map(Vec::as_slice).collect(),
            spans: self.spans.as_deref(),
            rank: self.ranks.as_deref().map(|ranks| Rank { version: 3, ranks }),
        }
    }
}

fn samples() -> [(&'static str, Sample, Codec); 3] {
    let [plain, scaled] = specs();
    let half = LayoutSpec { dtype: Dtype::F16, ..plain.clone() };
    [
        ("raw-f32.kv", Sample::new(plain), Codec::Raw),
        ("planes-bf16.kv", Sample::new(scaled), Codec::BytePlaneZstd { level: 3 }),
        ("ids-f16.kv", Sample::with_ids(half), Codec::Raw),
    ]
}

fn containers() -> Value {
    let describe = |(file, sample, _): &(&'static str, Sample, Codec)| {
        let bytes = std::fs::read(golden(file)).unwrap();
        let container = Container::parse(Bytes::from(bytes)).unwrap();
        let raw: Vec<_> = sample.layers.iter().map(|layer| hex(blake3::hash(layer).as_bytes())).collect();
        json!({"file": file, "hash": container.hash().to_string(), "layout": sample.spec.id().to_string(),
            "key": sample.key().to_string(), "layers_blake3": raw, "tokens": TOKENS,
            "spans": sample.spans.as_ref().map(|it| it.iter().map(|span| [span.start, span.end]).collect::<Vec<_>>()),
            "rank_version": 3, "ranks": sample.ranks, "ids": sample.ids})
    };
    Value::Array(samples().iter().map(describe).collect())
}

fn read_json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

#[test]
fn keys_are_those_that_were_published() {
    assert_eq!(keys(), read_json("keys.json"));
}

#[test]
fn containers_of_an_earlier_release_are_still_read() {
    assert_eq!(containers(), read_json("containers.json"));
    for (file, sample, codec) in samples() {
        let bytes = std::fs::read(golden(file)).unwrap();
        assert!(bytes.len() <= 20 * 1024);
        if codec == Codec::Raw {
            assert_eq!(sample.encoded(codec), bytes, "{file} is not what is written today");
        }
        let container = Container::parse(Bytes::from(bytes)).unwrap();
        container.verify_all().unwrap();
        for (layer, raw) in sample.layers.iter().enumerate() {
            assert_eq!(&container.layer(layer as u32).unwrap(), raw);
        }
        assert_eq!(container.spans().unwrap(), sample.spans);
        assert_eq!(container.rank().unwrap(), sample.ranks.map(|ranks| (3, ranks)));
        assert_eq!(container.ids().unwrap(), sample.ids);
    }
}

#[test]
fn every_kind_codec_and_dtype_has_a_golden_file() {
    let (mut kinds, mut codecs, mut dtypes) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (file, ..) in samples() {
        let head = Head::parse(&std::fs::read(golden(file)).unwrap()).unwrap();
        dtypes.insert(head.dtype().name());
        kinds.extend(head.segments().iter().map(|entry| entry.kind as u16));
        codecs.extend(head.segments().iter().map(|entry| entry.codec as u16));
    }
    // Codes are dense: the next one is none that a reader knows.
    let unknown = |field: &str, at: usize, code: u16| {
        let (file, ..) = &samples()[0];
        let mut bytes = std::fs::read(golden(file)).unwrap();
        bytes[at..at + 2].copy_from_slice(&code.to_le_bytes());
        let len = Head::len_from_prefix(&bytes).unwrap();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes[..112]).update(&bytes[128..len]);
        bytes[112..128].copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        let error = Head::parse(&bytes).unwrap_err();
        assert!(
            matches!(error, FormatError::Field { field: it, .. } if it == field),
            "{field} {code}: {error}"
        );
    };
    assert_eq!(kinds.iter().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
    unknown("segment kind", 128, 5);
    assert_eq!(codecs.iter().copied().collect::<Vec<_>>(), [0, 1]);
    unknown("codec", 130, 2);
    assert_eq!(dtypes.len(), 3);
    unknown("dtype", 14, 4);
}

#[test]
fn another_implementation_agrees() {
    let skip = |why: &str| {
        // Past the test harness's capture: a check that did not run must not look like one that did.
        let _ = writeln!(std::io::stderr(), "SKIPPED tests/golden/check.py: {why}");
    };
    match Command::new("python3").args(["-c", "import blake3, zstandard"]).output() {
        Err(error) => return skip(&format!("python3 does not run here ({error})")),
        Ok(probe) if !probe.status.success() => {
            return skip("python3 lacks a package: pip install blake3 zstandard");
        }
        Ok(_) => {}
    }
    let output = Command::new("python3").arg(golden("check.py")).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

/// Run by hand (`--ignored`) when a new format version gets golden files of its own.
#[test]
#[ignore = "writes the golden files"]
fn write_golden_files() {
    let write = |name: &str, value: &Value| {
        std::fs::write(golden(name), serde_json::to_string_pretty(value).unwrap() + "\n").unwrap();
    };
    for (file, sample, codec) in samples() {
        std::fs::write(golden(file), sample.encoded(codec)).unwrap();
    }
    write("keys.json", &keys());
    write("containers.json", &containers());
}
