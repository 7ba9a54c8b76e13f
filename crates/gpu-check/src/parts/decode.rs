//! Decoding: tokens per second at several batch sizes, beside the bytes that a step has to read.

use crate::bed::{Bed, Room, Timed as _};
use crate::model::{Model, tokens};
use crate::work::Work;
use cacheclip_bench::runs::Runs;
use cacheclip_model::config::Config;
use serde::Serialize;
use std::cell::RefCell;
use std::time::Instant;

#[derive(Debug, Serialize)]
struct Row {
    row: &'static str,
    shape: &'static str,
    batch: usize,
    /// Tokens in the cache of each sequence.
    columns: usize,
    /// Of all sequences.
    tokens_per_second: Runs,
    /// Weights once, keys and values of each sequence once.
    bytes_per_step: f64,
    bytes_per_second: Runs,
    /// Those over a copy's in the same round.
    of_copy: Option<Runs>,
}

/// Bytes that a step reads at least, in bf16: all weights but the embedding table, of which it takes rows; keys and values.
pub fn bytes(shape: &Config, batch: usize, columns: usize) -> f64 {
    let table = (shape.vocab * shape.hidden) as f64;
    // A tied table is read whole as the output head.
    let weights = shape.parameters() as f64 - if shape.tied { 0.0 } else { table };
    let kv = (2 * shape.layers * shape.kv_heads * shape.head_dim) as f64;
    2.0 * (weights + kv * (batch * columns) as f64)
}

/// Times every batch size.
///
/// # Errors
/// No device, or no room; a device fault.
pub fn run<B: Bed>(bed: &B, work: &Work, name: &'static str) -> anyhow::Result<()> {
    let (scale, shape) = (work.scale, work.scale.shape(name)?);
    let most = scale.batches.iter().max().copied().unwrap_or(1);
    let each = scale.columns + scale.steps;
    let room = Room::of(&shape, &vec![each; most], 0, scale.block_rows);
    let mut model = Model::random(bed, &shape, each, room)?;
    let mut sequences = Vec::new();
    for &batch in scale.batches {
        if work.deadline.passed() {
            return Ok(());
        }
        while sequences.len() < batch {
            let sequence = model.sequence(each)?;
            model.fill(&sequence, &tokens(scale.columns, sequences.len(), shape.vocab))?;
            sequences.push(sequence);
        }
        let tables: Vec<&[u32]> = sequences[..batch].iter().map(|sequence| sequence.table()).collect();
        let ids = tokens(batch, 3, shape.vocab);
        let mut logits = Vec::new();
        let bytes_per_step = bytes(&shape, batch, scale.columns + scale.steps / 2);
        let rates = RefCell::new((Vec::new(), Vec::new()));
        work.rounds(
            scale.rounds,
            || {
                let began = Instant::now();
                for step in 0..scale.steps {
                    // The step's logits come to the host, as a sampler there needs them.
                    model.decode(&ids, &vec![(scale.columns + step) as u32; batch], &tables, &mut logits)?;
                }
                let took = began.elapsed().as_secs_f64() / scale.steps as f64;
                let mut rates = rates.borrow_mut();
                rates.0.push(batch as f64 / took);
                let copy = model.decoder().device().copying(scale.copy)?;
                rates.1.extend(copy.map(|copy| bytes_per_step / took / copy));
                Ok(())
            },
            || *rates.borrow_mut() = Default::default(),
        )?;
        let (tokens_per_second, of_copy) = rates.into_inner();
        let tokens_per_second = Runs::of(tokens_per_second);
        let row = Row {
            row: "decode_model",
            shape: name,
            batch,
            columns: scale.columns,
            bytes_per_second: tokens_per_second.map(|rate| rate / batch as f64 * bytes_per_step),
            bytes_per_step,
            of_copy: (!of_copy.is_empty()).then(|| Runs::of(of_copy)),
            tokens_per_second,
        };
        let bandwidth = row.bytes_per_second.median / 1e9;
        work.say(format_args!(
            "batch {batch}: {} tokens/s, {bandwidth:.0} GB/s",
            row.tokens_per_second.text(1)
        ));
        work.row(&row)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_reads_the_weights_once_and_every_sequences_cache() {
        let shape = Config::shape("qwen2.5-14b").unwrap();
        let one = bytes(&shape, 1, 2048);
        // 14.77 billion parameters without 152,064 x 5,120 of embeddings, two bytes each; 196,608 bytes per token.
        assert!((one - (2.0 * 13.991e9 + 196_608.0 * 2048.0)).abs() < 1e7, "{one}");
        assert_eq!(bytes(&shape, 32, 2048) - one, 31.0 * 2048.0 * 196_608.0);
        let tied = Config::shape("smollm2-135m").unwrap();
        assert_eq!(bytes(&tied, 0, 0), 2.0 * tied.parameters() as f64);
    }
}
