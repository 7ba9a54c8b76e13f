//! What a worker can be told from outside.

use cacheclip_service::ConnectOptions;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Whether chunks are loaded or computed where both would do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loading {
    /// What would be had sooner, by measured bandwidth, speed and what waits for either.
    #[default]
    Auto,
    /// Loaded, whatever it takes.
    Always,
    /// Computed, as if there were no stores.
    Never,
}

/// Where the model is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Processor {
    /// On a CUDA device in a build that has CUDA, else on the CPU.
    #[default]
    Auto,
    /// On the CPU.
    Cpu,
    /// On a CUDA device. Without one the worker does not start.
    Cuda,
}

impl Processor {
    /// What is meant in this build.
    pub(crate) fn chosen(self) -> Self {
        match self {
            Self::Auto if cfg!(feature = "cuda") => Self::Cuda,
            Self::Auto => Self::Cpu,
            named => named,
        }
    }
}

/// How a CUDA device is used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CudaOptions {
    /// Which device, from 0.
    pub ordinal: usize,
    /// Most bytes of device memory; 0: nine tenths of what is free at start. What the model needs is computed before
    /// anything is allocated, and one that does not fit is refused.
    pub memory_bytes: u64,
    /// Most rows that go through a layer at a time.
    pub block_rows: usize,
    /// Copy and place KV beside computation. Off: in one stream with it.
    pub overlap: bool,
    /// Folder with cuBLAS's and NVRTC's libraries. Absent: where the loader finds them.
    pub libraries: Option<PathBuf>,
    /// Folder in which compiled kernels are kept: a worker that finds all of them there needs no NVRTC.
    pub kept: Option<PathBuf>,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            ordinal: 0,
            memory_bytes: 0,
            block_rows: cacheclip_model::cuda::BLOCK_ROWS,
            overlap: true,
            libraries: None,
            kept: None,
        }
    }
}

/// A worker's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Listening addresses and limits.
    pub service: cacheclip_service::Options,
    /// Name that requests choose the model by.
    pub model: String,
    /// Directory of the model: `config.json`, `*.safetensors`, `tokenizer.json`, `prompt.json`.
    pub model_dir: PathBuf,
    /// Random weights of a named shape instead of the directory's (the tokenizer still comes from there):
    /// right for time and bytes, meaningless as text. Shapes: `smollm2-135m`, `qwen2.5-0.5b`, `qwen2.5-7b`,
    /// `qwen2.5-14b`, `aux-30m`.
    pub random_shape: Option<String>,
    /// Where the model is computed: `auto` (on a CUDA device in a build that has CUDA), `cpu`, `cuda`.
    pub device: Processor,
    /// How a CUDA device is used.
    pub cuda: CudaOptions,
    /// Cache stores to fetch from and publish to, each `http://host:port`, or `dns+http://host:port` for every
    /// address of a name; stores that these name are used, too. Empty: the worker's own RAM is the only cache.
    pub stores: Vec<String>,
    /// How stores are dialled.
    pub connect: ConnectOptions,
    /// Bytes of decoded chunk KV kept in RAM.
    pub ram_bytes: u64,
    /// How long chunk KV is served from RAM before the stores are asked for it again: what has expired there is used no
    /// longer than that. 0: for ever.
    pub ram_seconds: u64,
    /// Bytes of paged KV for running sequences.
    pub page_bytes: u64,
    /// Longest prompt plus answer in tokens; 0: what the model allows.
    pub max_tokens: usize,
    /// Tokens generated when a request names no limit.
    pub default_answer_tokens: usize,
    /// Jobs of each kind that may wait for the engine, and requests that may wait for room to load.
    pub queue: usize,
    /// Rows of prefill, through all layers, between two decoding steps: what running answers wait for at most where
    /// prompts are computed meanwhile.
    pub prefill_rows: usize,
    /// Longest wait for importance sets before the next rung of the ladder.
    pub importance_timeout_seconds: f64,
    /// Longest wait for the stores' layers before what has not come is computed instead.
    pub load_timeout_seconds: f64,
    /// Bytes of chunk KV that requests may hold at a time between asking for it and its placement in pages, whether it
    /// is on its way or computed; what the RAM tier holds for them counts there. Further requests wait, up to `queue` of
    /// them. A request that is larger by itself passes through in pieces, as fast as its KV is placed; only what cannot be
    /// cut (a layer of a chunk that is loaded, a chunk that is computed) may go beyond this bound, if it is larger.
    pub load_bytes: u64,
    /// Which of the chunks that the stores may have are loaded: `auto` (those that would be computed later),
    /// `always`, `never`.
    pub loading: Loading,
    /// Compute a layer while the next one is loaded. Off: begin when everything has come, but for requests larger than
    /// `load_bytes`.
    pub pipeline: bool,
    /// Chunks that may wait to be written to the stores; one more is not stored.
    pub write_queue: usize,
    /// Compress KV that is written to the stores: it takes less room there, and pays in time over slow links only.
    pub compress: bool,
    /// Fuse the static rank of ingest with the scorer's order.
    pub fuse_static_rank: bool,
    /// Fuse the primary's own question attention on the stale cache.
    pub probe: bool,
    /// Share of greedy requests whose prompt is also computed in context after their first token, to count how
    /// often the two first tokens differ; each costs a full prefill. 0: none.
    pub shadow_ratio: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            service: cacheclip_service::Options::default(),
            model: "tiny".into(),
            model_dir: "models/tiny/primary".into(),
            random_shape: None,
            device: Processor::Auto,
            cuda: CudaOptions::default(),
            stores: Vec::new(),
            connect: ConnectOptions::default(),
            ram_bytes: 1 << 30,
            ram_seconds: 3600,
            page_bytes: 512 << 20,
            max_tokens: 0,
            default_answer_tokens: 64,
            queue: 64,
            prefill_rows: 64,
            importance_timeout_seconds: 5.0,
            load_timeout_seconds: 10.0,
            load_bytes: 1 << 30,
            loading: Loading::Auto,
            pipeline: true,
            write_queue: 64,
            compress: false,
            fuse_static_rank: false,
            probe: false,
            shadow_ratio: 0.0,
        }
    }
}
