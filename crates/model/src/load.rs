//! From a Hugging Face directory (or a seed) to a decoder on a device.

use crate::config::Config;
use crate::decoder::{Decoder, HeadNorms, Layer, Weights};
use crate::device::Device;
use crate::error::Error;
use crate::weights::Values;
use candle_core::{DType, Tensor};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a model's weights come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A Hugging Face directory: `config.json` and `model*.safetensors`.
    Dir(PathBuf),
    /// Random weights at a true shape: right for time and bytes, meaningless as text.
    Random {
        /// Shape.
        config: Config,
        /// The same seed gives the same weights.
        seed: u64,
    },
}

impl Source {
    /// The model's shape.
    ///
    /// # Errors
    /// As [`Config::from_dir`].
    pub fn config(&self) -> Result<Config, Error> {
        match self {
            Self::Dir(dir) => Config::from_dir(dir),
            Self::Random { config, .. } => Ok(config.clone()),
        }
    }

    /// The directory, or random weights of the shape that is named instead (see [`Config::SHAPES`]).
    ///
    /// # Errors
    /// An unknown shape.
    pub fn choose(dir: &Path, random_shape: Option<&str>) -> Result<Self, Error> {
        let Some(name) = random_shape else { return Ok(Self::Dir(dir.to_owned())) };
        let config = Config::shape(name).ok_or_else(|| Error::UnknownShape { name: name.to_owned() })?;
        Ok(Self::Random { config, seed: 1 })
    }
}

/// A decoder and the digest of the weights it was made from.
#[derive(Debug)]
pub struct Loaded<D: Device> {
    /// The model.
    pub decoder: Decoder<D>,
    /// blake3 of the weight files (or of shape and seed).
    pub weights_digest: [u8; 32],
}

/// Loads `source` onto `device`. The arithmetic is the device's, whatever the files hold.
///
/// # Errors
/// Files missing or unreadable, a family or feature that is not supported, weights that do not fit.
pub fn load<D: Device>(source: &Source, device: D) -> Result<Loaded<D>, Error> {
    match source {
        Source::Dir(dir) => {
            let config = Config::from_dir(dir)?;
            let files = weight_files(dir)?;
            let mut tensors = HashMap::new();
            for file in &files {
                tensors.extend(candle_core::safetensors::load(file, &candle_core::Device::Cpu)?);
            }
            let weights_digest = digest(&files)?;
            // Taken out one by one: what is left over tells that another model was meant.
            let tensors = RefCell::new(tensors);
            let loaded = build(config, device, weights_digest, |name, shape| {
                from_tensor(tensors.borrow_mut().remove(name), name, shape)
            })?;
            refuse_leftovers(loaded.decoder.config(), tensors.into_inner().into_keys())?;
            Ok(loaded)
        }
        Source::Random { config, seed } => {
            let text = format!("random weights {} seed {seed}", config.canonical());
            let digest = *blake3::hash(text.as_bytes()).as_bytes();
            build(config.clone(), device, digest, |name, shape| Ok(random(*seed, name, shape)))
        }
    }
}

fn build<D: Device>(
    config: Config,
    device: D,
    weights_digest: [u8; 32],
    fetch: impl Fn(&str, &[usize]) -> Result<Values, Error>,
) -> Result<Loaded<D>, Error> {
    let c = &config;
    let (hidden, ff) = (c.hidden, c.intermediate);
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let attention = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
    let stacked = |parts: &[(&str, usize)], layer: usize| -> Result<D::Matrix, Error> {
        let part = |(name, rows): &(&str, usize)| {
            fetch(&format!("model.layers.{layer}.{name}.weight"), &[*rows, hidden])
        };
        let values = parts.iter().map(part).collect::<Result<_, Error>>()?;
        device.matrix(values, parts.iter().map(|(_, rows)| rows).sum(), hidden)
    };
    let biases = |layer: usize| -> Result<D::Vector, Error> {
        let part = |(name, rows)| fetch(&format!("model.layers.{layer}.{name}.bias"), &[rows]);
        device.vector(Values::join(attention.map(part).into_iter().collect::<Result<_, Error>>()?))
    };
    let matrix =
        |name: &str, outputs, inputs| device.matrix(vec![fetch(name, &[outputs, inputs])?], outputs, inputs);
    let vector = |name: &str, width| device.vector(fetch(name, &[width])?.into_vec());
    let mut layers = Vec::with_capacity(c.layers);
    for i in 0..c.layers {
        let name = |part: &str| format!("model.layers.{i}.{part}.weight");
        let head_norms = || -> Result<HeadNorms<D>, Error> {
            let vector = |part| vector(&name(part), c.head_dim);
            Ok(HeadNorms { query: vector("self_attn.q_norm")?, key: vector("self_attn.k_norm")? })
        };
        layers.push(Layer {
            attention_norm: vector(&name("input_layernorm"), hidden)?,
            qkv: stacked(&attention, i)?,
            qkv_bias: c.family.has_qkv_biases().then(|| biases(i)).transpose()?,
            head_norms: c.family.has_head_norms().then(head_norms).transpose()?,
            output: matrix(&name("self_attn.o_proj"), hidden, q)?,
            mlp_norm: vector(&name("post_attention_layernorm"), hidden)?,
            gate_up: stacked(&[("mlp.gate_proj", ff), ("mlp.up_proj", ff)], i)?,
            down: matrix(&name("mlp.down_proj"), hidden, ff)?,
        });
    }
    let embedding = Arc::new(matrix("model.embed_tokens.weight", c.vocab, hidden)?);
    let head = match c.tied {
        true => Arc::clone(&embedding),
        false => Arc::new(matrix("lm_head.weight", c.vocab, hidden)?),
    };
    let norm = vector("model.norm.weight", hidden)?;
    let weights = Weights { embedding, layers, norm, head };
    Ok(Loaded { decoder: Decoder::assemble(Arc::new(device), config, weights), weights_digest })
}

fn from_tensor(tensor: Option<Tensor>, name: &str, shape: &[usize]) -> Result<Values, Error> {
    let tensor = tensor.ok_or_else(|| Error::Weights(format!("{name} is missing")))?;
    if tensor.dims() != shape {
        return Err(Error::Weights(format!(
            "{name} has shape {:?}, config.json says {shape:?}",
            tensor.dims()
        )));
    }
    Ok(Values::Given(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?))
}

/// Weights that nothing asked for, such as the biases of another family or layers behind the last, change
/// what the model should have answered. Only what is known to change nothing may be left over.
fn refuse_leftovers(config: &Config, names: impl Iterator<Item = String>) -> Result<(), Error> {
    let harmless = |name: &String| {
        // Old checkpoints hold the frequencies, which follow from the configuration.
        name.ends_with(".rotary_emb.inv_freq") || (config.tied && name == "lm_head.weight")
    };
    match names.filter(|name| !harmless(name)).min() {
        None => Ok(()),
        Some(name) => Err(Error::Weights(format!(
            "{name} has no place in a {} decoder of {} layers; use config.json and weights of the same model",
            config.family.name(),
            config.layers,
        ))),
    }
}

/// Uniform values with the variance of a fan-in initialisation; norms are ones, and biases have the variance
/// of what they are added to.
fn random(seed: u64, name: &str, shape: &[usize]) -> Values {
    let count = shape.iter().product();
    if shape.len() == 1 && !name.ends_with(".bias") {
        return Values::Given(vec![1.0; count]);
    }
    let fan_in = shape.get(1).copied().unwrap_or(1);
    let bound = (3.0 / fan_in as f32).sqrt();
    let hash = blake3::hash(format!("{seed}/{name}").as_bytes());
    let base = u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap_or_default());
    Values::Random { base, bound, count }
}

/// The directory's weight files: those its index names, or the single file.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![dir.join("model.safetensors")]);
    }
    let text =
        std::fs::read_to_string(&index).map_err(|source| Error::Read { path: index.clone(), source })?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::Weights(format!("{}: {e}", index.display())))?;
    let names = value["weight_map"].as_object().into_iter().flat_map(|map| map.values());
    let mut files: Vec<PathBuf> = names.filter_map(|v| v.as_str()).map(|name| dir.join(name)).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// blake3 over the files in order, each with its length before it.
fn digest(files: &[PathBuf]) -> Result<[u8; 32], Error> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    for path in files {
        let fault = |source| Error::Read { path: path.clone(), source };
        let mut file = std::fs::File::open(path).map_err(fault)?;
        hasher.update(&file.metadata().map_err(fault)?.len().to_le_bytes());
        loop {
            let count = file.read(&mut buffer).map_err(fault)?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
        }
    }
    Ok(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;

    #[test]
    fn a_missing_directory_is_named_in_the_error() {
        let error = load(&Source::Dir("/no/such/model".into()), Cpu).unwrap_err().to_string();
        assert!(error.contains("/no/such/model/config.json"), "{error}");
    }

    #[test]
    fn random_weights_depend_on_their_seed_and_name_only() {
        let values = |seed, name| random(seed, name, &[4, 8]).into_vec();
        assert_eq!(values(1, "a"), values(1, "a"));
        assert_ne!(values(1, "a"), values(2, "a"));
        assert_ne!(values(1, "a"), values(1, "b"));
    }
}
