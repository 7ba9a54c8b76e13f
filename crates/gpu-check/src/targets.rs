//! What is wanted of one H200-class GPU, beside what was measured.

use crate::report::Report;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A figure that is wanted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// What.
    pub what: String,
    /// At least; of the break-even, at most.
    pub wanted: f64,
    /// Median of what was measured; none where it was not.
    pub measured: Option<f64>,
    /// Runs that the median is of.
    pub n: Option<u64>,
    /// Whether it is met; none where it was not measured.
    pub met: Option<bool>,
}

impl Target {
    fn least(what: &str, wanted: f64, runs: Option<&Value>) -> Self {
        let measured = runs.and_then(|runs| runs["median"].as_f64());
        let n = runs.and_then(|runs| runs["n"].as_u64());
        Self { what: what.to_owned(), wanted, measured, n, met: measured.map(|it| it >= wanted) }
    }

    /// One line.
    pub fn text(&self) -> String {
        let Self { what, wanted, measured, n, met } = self;
        let Some(measured) = measured else { return format!("not measured: {what}, wanted {wanted}") };
        let met = if met == &Some(true) { "met" } else { "MISSED" };
        let n = n.map(|n| format!(", n = {n}")).unwrap_or_default();
        format!("{met}: {what}: {measured:.3}, wanted {wanted}{n}")
    }
}

/// Length, shape and share at which most is wanted.
const TOKENS: u64 = 16_384;
const SHAPE: &str = "qwen2.5-14b";

/// All targets.
pub fn targets(report: &Report) -> Vec<Target> {
    let at = |kind, tokens: u64| {
        report.rows(kind).find(move |row| row["shape"] == SHAPE && row["tokens"].as_u64() == Some(tokens))
    };
    let prompt = at("prompt", TOKENS);
    let speedup = |ratio| prompt.and_then(|row| reuse(row, ratio)).map(|reuse| &reuse["speedup"]);
    let bf16 = |row: &&Value| row["shape"] == SHAPE && row["tokens"] == TOKENS && row["stored"] == "bf16";
    vec![
        Target::least("speed-up of 16K tokens at ratio 0.2", 4.0, speedup(0.2)),
        Target::least("speed-up of 16K tokens at ratio 0.1", 7.0, speedup(0.1)),
        Target::least(
            "full prefill of 16K tokens, of PyTorch's rate",
            0.8,
            prompt.and_then(|row| row.get("of_torch")).filter(|it| it.is_object()),
        ),
        break_even(report),
        Target::least(
            "attend_rows of 16K rows, of flash attention's rate",
            0.6,
            at("attend_rows", TOKENS).and_then(|row| row.get("of_flash")).filter(|it| it.is_object()),
        ),
        Target::least(
            "place, of a copy's bandwidth",
            0.7,
            report.rows("place").find(bf16).map(|row| &row["of_copy"]),
        ),
        decode(report),
        growing(report),
        share(
            report,
            "attend_rows of 16K rows, of a product's rate",
            at("attend_rows", TOKENS).map(|row| &row["flops_per_second"]),
        ),
        share(
            report,
            "full prefill of 16K tokens, of a product's rate",
            prompt.map(|row| &row["full_flops_per_second"]),
        ),
        there(report, "certificate", "the certificate"),
        there(report, "answers", "greedy answers equal to the CPU's"),
        there(report, "from_store", "KV from a store"),
        there(report, "overlap", "overlap, on and off"),
    ]
}

/// Reuse at a ratio, with the first auxiliary model.
fn reuse(row: &Value, ratio: f64) -> Option<&Value> {
    let near = |it: &&Value| it["ratio"].as_f64().is_some_and(|is| (is - ratio).abs() < 1e-3);
    row["reuse"].as_array()?.iter().find(near)
}

/// The shortest prompt that reuse at ratio 0.2 is faster for.
fn break_even(report: &Report) -> Target {
    let faster = report.rows("prompt").filter(|row| {
        let gain = reuse(row, 0.2).and_then(|it| it["speedup"]["median"].as_f64());
        row["shape"] == SHAPE && gain.is_some_and(|gain| gain > 1.0)
    });
    let measured = faster.filter_map(|row| row["tokens"].as_f64()).reduce(f64::min);
    let wanted = 1024.0;
    let what = "tokens from which reuse at ratio 0.2 is faster, of the lengths measured".to_owned();
    Target { what, wanted, measured, n: None, met: measured.map(|it| it <= wanted) }
}

fn of_batch(report: &Report, batch: u64) -> Option<&Value> {
    report.rows("decode_model").find(|row| row["shape"] == SHAPE && row["batch"].as_u64() == Some(batch))
}

/// Decoding at batch 1, of the bandwidth of a copy in the same rounds.
fn decode(report: &Report) -> Target {
    let of_copy = of_batch(report, 1).map(|row| &row["of_copy"]);
    Target::least("decoding at batch 1, of a copy's bandwidth", 0.7, of_copy)
}

/// A rate of 16K tokens over that of PyTorch's product of two matrices of 8,192 x 8,192: stated, and nothing is wanted of it.
fn share(report: &Report, what: &str, runs: Option<&Value>) -> Target {
    let peak = report.rows("peer").find_map(|row| row["product_flops_per_second"]["median"].as_f64());
    let measured = runs.and_then(|runs| runs["median"].as_f64()).zip(peak).map(|(rate, peak)| rate / peak);
    let n = runs.and_then(|runs| runs["n"].as_u64());
    Target { what: what.to_owned(), wanted: 0.0, measured, n, met: measured.map(|_| true) }
}

/// Whether a row is there and, where it says so, passed.
fn there(report: &Report, kind: &str, what: &str) -> Target {
    let row = report.rows(kind).next();
    let measured = row.map(|row| f64::from(u8::from(row["passed"] != Value::Bool(false))));
    let n = row.and_then(|row| row["n"].as_u64());
    Target { what: what.to_owned(), wanted: 1.0, measured, n, met: measured.map(|it| it >= 1.0) }
}

/// The smallest growth of throughput when the batch doubles, up to 32.
fn growing(report: &Report) -> Target {
    let rates: Option<Vec<f64>> = [1, 2, 4, 8, 16, 32]
        .into_iter()
        .map(|batch| of_batch(report, batch)?["tokens_per_second"]["median"].as_f64())
        .collect();
    let measured = rates.and_then(|rates| rates.windows(2).map(|pair| pair[1] / pair[0]).reduce(f64::min));
    let what = "throughput over that of half the batch, up to 32, the smallest".to_owned();
    Target { what, wanted: 1.0, measured, n: None, met: measured.map(|it| it > 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parts::Part;
    use crate::report::{Done, State};
    use serde_json::json;

    fn runs(median: f64) -> Value {
        json!({ "median": median, "least": median, "most": median, "n": 7 })
    }

    fn of(rows: Vec<Value>) -> Vec<Option<(f64, bool)>> {
        let mut report = Report::begin(false);
        report.parts.push(Done { part: Part::Times, state: State::Done, seconds: 1.0, rows });
        targets(&report).into_iter().map(|it| it.measured.zip(it.met)).collect()
    }

    fn prompt(tokens: u64, speedup: f64) -> Value {
        let reuse = |ratio, speedup| json!({ "ratio": ratio, "speedup": runs(speedup) });
        json!({
            "row": "prompt", "shape": SHAPE, "tokens": tokens, "of_torch": runs(0.79),
            "reuse": [reuse(0.2f32, speedup), reuse(0.1f32, 2.0 * speedup)],
        })
    }

    #[test]
    fn nothing_is_met_that_was_not_measured() {
        let none = of(Vec::new());
        assert_eq!(none, vec![None; none.len()]);
        // A peer that was not there; another shape.
        let rows = vec![
            json!({ "row": "attend_rows", "shape": SHAPE, "tokens": TOKENS, "of_flash": null }),
            json!({ "row": "place", "shape": "qwen2.5-7b", "tokens": TOKENS, "stored": "bf16", "of_copy": runs(0.9) }),
        ];
        assert_eq!(of(rows), none);
    }

    #[test]
    fn what_was_measured_is_compared_with_what_is_wanted() {
        let mut rows = vec![prompt(TOKENS, 4.1), prompt(2048, 1.2), prompt(1024, 0.9)];
        for (batch, rate) in [(1, 50.0), (2, 99.0), (4, 190.0), (8, 300.0), (16, 400.0), (32, 390.0)] {
            rows.push(json!({
                "row": "decode_model", "shape": SHAPE, "batch": batch, "tokens_per_second": runs(rate),
                "of_copy": runs(0.75),
            }));
        }
        let found = of(rows);
        assert_eq!(found[0], Some((4.1, true)));
        assert_eq!(found[1], Some((8.2, true)));
        assert_eq!(found[2], Some((0.79, false)));
        assert_eq!(found[3], Some((2048.0, false)));
        assert_eq!(found[6], Some((0.75, true)));
        assert_eq!(found[7], Some((390.0 / 400.0, false)));
    }
}
