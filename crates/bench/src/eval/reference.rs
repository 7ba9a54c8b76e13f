//! A second, plain decoder for what the engine does not offer: attention with temperature and scaling, keys at any
//! positions, and the queries of a question that saw nothing of the prompt.
//!
//! Only question rows go through it, so it is written to be read. A test holds its logits against the engine's.

use super::Error;
use cacheclip_kernels::matrix::Matrix;
use cacheclip_kernels::ops;
use cacheclip_kernels::rope::RopeTable;
use cacheclip_model::config::Config;
use cacheclip_model::kv::ChunkKv;
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// How attention over the context's columns is changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reshape {
    /// Divides the logits of context columns.
    pub temperature: f32,
    /// Multiplies the log-sum-exp of context columns before they are merged with all others.
    pub scale: f32,
}

impl Reshape {
    /// Attention as it is.
    pub const NONE: Self = Self { temperature: 1.0, scale: 1.0 };
}

/// Keys (rotated) and values that rows attend to, per layer `[columns, kv_heads · head_dim]` each.
#[derive(Clone, Debug, Default)]
pub struct Columns {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    count: usize,
    /// Columns whose attention is reshaped.
    pub context: Range<usize>,
}

impl Columns {
    /// Number of columns.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Forgets the columns behind the first `count`.
    pub fn truncate(&mut self, count: usize) {
        if count < self.count {
            for values in self.keys.iter_mut().chain(&mut self.values) {
                values.truncate(values.len() / self.count * count);
            }
            self.count = count;
        }
    }
}

#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    qkv: Matrix,
    bias: Option<Vec<f32>>,
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    output: Matrix,
    mlp_norm: Vec<f32>,
    gate_up: Matrix,
    down: Matrix,
}

/// The plain decoder.
#[derive(Debug)]
pub struct Reference {
    config: Config,
    rope: RopeTable,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// `None` where the embedding table is the head, too.
    head: Option<Matrix>,
}

impl Reference {
    /// Reads a model directory of the families the engine knows.
    ///
    /// # Errors
    /// Files missing, unreadable or of another model.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let config = Config::from_dir(dir).map_err(|source| Error::Model { dir: dir.to_owned(), source })?;
        let mut tensors = Tensors::read(dir)?;
        let c = &config;
        let mut layers = Vec::new();
        for index in 0..c.layers {
            let name = |part: &str| format!("model.layers.{index}.{part}");
            let projections = ["q_proj", "k_proj", "v_proj"].map(|it| name(&format!("self_attn.{it}")));
            let mut stack = |parts: &[String], suffix: &str| -> Result<Vec<f32>, Error> {
                let parts: Result<Vec<_>, _> =
                    parts.iter().map(|part| tensors.take(&format!("{part}.{suffix}"))).collect();
                Ok(parts?.concat())
            };
            let qkv = stack(&projections, "weight")?;
            let bias = if c.family.has_qkv_biases() { Some(stack(&projections, "bias")?) } else { None };
            let gate_up = stack(&["gate_proj", "up_proj"].map(|it| name(&format!("mlp.{it}"))), "weight")?;
            let head_norms = if c.family.has_head_norms() {
                let norm = |it: &str| name(&format!("self_attn.{it}.weight"));
                Some((tensors.take(&norm("q_norm"))?, tensors.take(&norm("k_norm"))?))
            } else {
                None
            };
            layers.push(Layer {
                attention_norm: tensors.take(&name("input_layernorm.weight"))?,
                qkv: matrix(qkv, c.hidden),
                bias,
                head_norms,
                output: matrix(tensors.take(&name("self_attn.o_proj.weight"))?, c.heads * c.head_dim),
                mlp_norm: tensors.take(&name("post_attention_layernorm.weight"))?,
                gate_up: matrix(gate_up, c.hidden),
                down: matrix(tensors.take(&name("mlp.down_proj.weight"))?, c.intermediate),
            });
        }
        let head = if c.tied { None } else { Some(matrix(tensors.take("lm_head.weight")?, c.hidden)) };
        Ok(Self {
            rope: RopeTable::new(c.head_dim, c.max_positions, c.rope_theta, c.rope_scaling),
            embedding: matrix(tensors.take("model.embed_tokens.weight")?, c.hidden),
            norm: tensors.take("model.norm.weight")?,
            layers,
            head,
            config,
        })
    }

    /// Appends a section's columns with their keys rotated to `positions`.
    pub fn place(&self, columns: &mut Columns, kv: &ChunkKv, positions: &[u32]) {
        let (heads, dim) = (self.config.kv_heads, self.config.head_dim);
        columns.keys.resize(self.config.layers, Vec::new());
        columns.values.resize(self.config.layers, Vec::new());
        for (layer, kv) in kv.layers().enumerate() {
            for (token, &position) in positions.iter().enumerate() {
                for head in 0..heads {
                    let at = (head * kv.tokens + token) * dim..(head * kv.tokens + token + 1) * dim;
                    let mut key = kv.k()[at.clone()].to_vec();
                    self.rope.rotate(&mut key, position as usize);
                    columns.keys[layer].extend(key);
                    columns.values[layer].extend_from_slice(&kv.v()[at]);
                }
            }
        }
        columns.count += positions.len();
    }

    /// Computes rows that follow all columns, each seeing them and the rows up to itself; appends the rows' columns.
    /// Returns logits `[rows, vocab]`.
    pub fn run(&self, columns: &mut Columns, ids: &[u32], positions: &[u32], reshape: Reshape) -> Vec<f32> {
        let x = self.through_layers(columns, ids, positions, reshape, |_, _| {});
        let mut normed = vec![0.0; x.len()];
        ops::rms_norm(&x, &self.norm, self.config.norm_eps, &mut normed);
        project(self.head.as_ref().unwrap_or(&self.embedding), &normed)
    }

    /// Attention that rows which saw only `own` would give to `watched` beside it: mean over heads, rows and
    /// layers, `[watched columns]`.
    pub fn foreign_attention(
        &self,
        own: &mut Columns,
        watched: &Columns,
        ids: &[u32],
        positions: &[u32],
    ) -> Vec<f32> {
        let mut sums = vec![0.0; watched.count];
        let before = own.count;
        let mut queries: Vec<Vec<f32>> = Vec::new();
        self.through_layers(own, ids, positions, Reshape::NONE, |_, qkv| queries.push(qkv.to_vec()));
        let (heads, width) = (self.config.heads, self.qkv_width());
        for (layer, qkv) in queries.iter().enumerate() {
            for (row, qkv) in qkv.chunks_exact(width).enumerate() {
                for head in 0..heads {
                    let mut logits = self.logits(&watched.keys[layer], 0..watched.count, qkv, head);
                    logits.extend(self.logits(&own.keys[layer], 0..before + row + 1, qkv, head));
                    softmax(&mut logits);
                    sums.iter_mut().zip(&logits).for_each(|(sum, weight)| *sum += weight);
                }
            }
        }
        let count = (heads * ids.len() * self.config.layers) as f32;
        sums.iter_mut().for_each(|sum| *sum /= count);
        sums
    }

    fn qkv_width(&self) -> usize {
        (self.config.heads + 2 * self.config.kv_heads) * self.config.head_dim
    }

    fn through_layers(
        &self,
        columns: &mut Columns,
        ids: &[u32],
        positions: &[u32],
        reshape: Reshape,
        mut look: impl FnMut(usize, &[f32]),
    ) -> Vec<f32> {
        let c = &self.config;
        columns.keys.resize(c.layers, Vec::new());
        columns.values.resize(c.layers, Vec::new());
        let mut x = vec![0.0; ids.len() * c.hidden];
        for (row, &id) in x.chunks_exact_mut(c.hidden).zip(ids) {
            self.embedding.row_into(id as usize, row);
        }
        let before = columns.count;
        for (index, layer) in self.layers.iter().enumerate() {
            let mut normed = vec![0.0; x.len()];
            ops::rms_norm(&x, &layer.attention_norm, c.norm_eps, &mut normed);
            let mut qkv = project(&layer.qkv, &normed);
            for (row, &position) in qkv.chunks_exact_mut(self.qkv_width()).zip(positions) {
                self.finish_row(layer, row, position as usize);
                let (keys, values) = row[c.heads * c.head_dim..].split_at(c.kv_heads * c.head_dim);
                columns.keys[index].extend_from_slice(keys);
                columns.values[index].extend_from_slice(values);
            }
            look(index, &qkv);
            let mut attended = vec![0.0; ids.len() * c.heads * c.head_dim];
            for (row, (qkv, out)) in qkv
                .chunks_exact(self.qkv_width())
                .zip(attended.chunks_exact_mut(c.heads * c.head_dim))
                .enumerate()
            {
                for (head, out) in out.chunks_exact_mut(c.head_dim).enumerate() {
                    self.attend(columns, index, before + row + 1, qkv, head, reshape, out);
                }
            }
            ops::add(&mut x, &project(&layer.output, &attended));
            ops::rms_norm(&x, &layer.mlp_norm, c.norm_eps, &mut normed);
            let gate_up = project(&layer.gate_up, &normed);
            let mut gated = vec![0.0; ids.len() * c.intermediate];
            ops::silu_gate(&gate_up, c.intermediate, &mut gated);
            ops::add(&mut x, &project(&layer.down, &gated));
        }
        columns.count += ids.len();
        x
    }

    /// Bias, head norms and rotation of one fused row.
    fn finish_row(&self, layer: &Layer, row: &mut [f32], position: usize) {
        let c = &self.config;
        if let Some(bias) = &layer.bias {
            ops::add(row, bias);
        }
        for (head, values) in row.chunks_exact_mut(c.head_dim).take(c.heads + c.kv_heads).enumerate() {
            if let Some((query, key)) = &layer.head_norms {
                let weight = if head < c.heads { query } else { key };
                let before = values.to_vec();
                ops::rms_norm(&before, weight, c.norm_eps, values);
            }
            self.rope.rotate(values, position);
        }
    }

    /// Scaled dot products of one head's query with the keys of `range`.
    fn logits(&self, keys: &[f32], range: Range<usize>, qkv: &[f32], head: usize) -> Vec<f32> {
        let c = &self.config;
        let query = &qkv[head * c.head_dim..(head + 1) * c.head_dim];
        let at = head / (c.heads / c.kv_heads) * c.head_dim;
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        range
            .map(|column| {
                let key = &keys[column * c.kv_heads * c.head_dim + at..][..c.head_dim];
                scale * query.iter().zip(key).map(|(a, b)| a * b).sum::<f32>()
            })
            .collect()
    }

    #[allow(clippy::too_many_arguments, reason = "one head of one row, spelled out")]
    fn attend(
        &self,
        columns: &Columns,
        layer: usize,
        visible: usize,
        qkv: &[f32],
        head: usize,
        reshape: Reshape,
        out: &mut [f32],
    ) {
        let c = &self.config;
        let mut logits = self.logits(&columns.keys[layer], 0..visible, qkv, head);
        let context = columns.context.start.min(visible)..columns.context.end.min(visible);
        if reshape != Reshape::NONE && !context.is_empty() {
            // exp(scale · lse) spread over the context as its own softmax says: one joint softmax again.
            let inside = &mut logits[context];
            inside.iter_mut().for_each(|logit| *logit /= reshape.temperature);
            let lse = log_sum_exp(inside);
            inside.iter_mut().for_each(|logit| *logit += (reshape.scale - 1.0) * lse);
        }
        softmax(&mut logits);
        let at = head / (c.heads / c.kv_heads) * c.head_dim;
        for (column, weight) in logits.iter().enumerate() {
            let value = &columns.values[layer][column * c.kv_heads * c.head_dim + at..][..c.head_dim];
            out.iter_mut().zip(value).for_each(|(into, value)| *into += weight * value);
        }
    }
}

fn log_sum_exp(logits: &[f32]) -> f32 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    most + logits.iter().map(|logit| (logit - most).exp()).sum::<f32>().ln()
}

fn softmax(logits: &mut [f32]) {
    let lse = log_sum_exp(logits);
    logits.iter_mut().for_each(|logit| *logit = (*logit - lse).exp());
}

fn matrix(data: Vec<f32>, inputs: usize) -> Matrix {
    let outputs = data.len() / inputs;
    Matrix::new(data, outputs, inputs)
}

fn project(matrix: &Matrix, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len() / matrix.inputs() * matrix.outputs()];
    matrix.project(x, &mut out);
    out
}

/// The directory's tensors as f32.
struct Tensors(HashMap<String, Vec<f32>>);

impl Tensors {
    fn read(dir: &Path) -> Result<Self, Error> {
        let mut tensors = HashMap::new();
        let io = |source| Error::Io { path: dir.to_owned(), source };
        let mut files: Vec<_> = std::fs::read_dir(dir)
            .map_err(io)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|it| it == "safetensors"))
            .collect();
        files.sort();
        for file in files {
            let bytes = std::fs::read(&file).map_err(|source| Error::Io { path: file.clone(), source })?;
            let bad = |why: String| Error::Weights { path: file.clone(), why };
            let parsed = SafeTensors::deserialize(&bytes).map_err(|error| bad(error.to_string()))?;
            for (name, view) in parsed.tensors() {
                let values = values(view.dtype(), view.data()).ok_or_else(|| {
                    bad(format!("{name} has dtype {:?}; F32, BF16 and F16 are read", view.dtype()))
                })?;
                tensors.insert(name, values);
            }
        }
        Ok(Self(tensors))
    }

    fn take(&mut self, name: &str) -> Result<Vec<f32>, Error> {
        let missing = || Error::Weights { path: name.into(), why: "the tensor is missing".into() };
        self.0.remove(name).ok_or_else(missing)
    }
}

fn values(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let halves = || bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    match dtype {
        Dtype::F32 => {
            Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        Dtype::BF16 => Some(halves().map(|bits| half::bf16::from_bits(bits).to_f32()).collect()),
        Dtype::F16 => Some(halves().map(|bits| half::f16::from_bits(bits).to_f32()).collect()),
        _ => None,
    }
}
