//! `cacheclip bench peers`: the engine beside PyTorch and llama.cpp.
//!
//! One round times every engine once, so that what else the machine does falls on all of them; a ratio is taken within
//! a round, and the median over rounds is what counts.

use super::alone::{self, Alone};
use super::bar;
use super::bed::Common;
use super::measure::{Machine, Runs, peak_rss_bytes};
use super::work::{End, operations};
use crate::text;
use anyhow::Context as _;
use cacheclip_bench::peers::Peers;
use cacheclip_model::config::Config;
use cacheclip_model::{Cpu, Decoder, Logits, Pass};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Arguments of `bench peers`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Tokens of the prompt; of decoding: tokens in the cache before the first step.
    #[arg(long, value_delimiter = ',', default_value = "2048")]
    tokens: Vec<usize>,
    /// What is timed: prefill, decode.
    #[arg(long, value_delimiter = ',', default_value = "prefill,decode")]
    ops: Vec<String>,
    /// Engines beside ours: torch, llama.cpp (flash attention), llama.cpp-plain.
    #[arg(long, value_delimiter = ',', default_value = "torch,llama.cpp,llama.cpp-plain")]
    peers: Vec<String>,
    /// Rounds.
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// Tokens decoded in a run.
    #[arg(long, default_value_t = 16)]
    steps: usize,
    /// Python with the peers installed.
    #[arg(long, default_value = "target/peers/venv/bin/python")]
    python: PathBuf,
    /// The script that runs the peers.
    #[arg(long, default_value = "crates/bench/peers/peers.py")]
    script: PathBuf,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    shape: String,
    parameters: usize,
    rows: Vec<Row>,
    peak_rss_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Row {
    op: String,
    tokens: usize,
    engine: String,
    version: String,
    dtype: String,
    /// Of the prompt, or decoded.
    tokens_per_second: Runs,
    /// Ours over this engine's, round by round.
    ratio: Runs,
    /// Of prefill: floating-point operations per second over this machine's limit. Of decoding: bytes of f32 keys and
    /// values and of weights as our engine keeps them, over the limit of reading. Ours only.
    share_of_limit: Option<f64>,
    /// CPUs that others used while it ran: figures with more than 0.1 are disturbed.
    others_cpus: Option<Runs>,
}

/// What one engine did in each round.
#[derive(Debug, Default)]
struct Seen {
    rates: Vec<f64>,
    others: Vec<f64>,
    version: String,
    dtype: String,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let known = |name: &String| ["torch", "llama.cpp", "llama.cpp-plain"].contains(&name.as_str());
    anyhow::ensure!(arguments.peers.iter().all(known), "peers: torch, llama.cpp, llama.cpp-plain");
    let of = |op: &String| ["prefill", "decode"].contains(&op.as_str());
    anyhow::ensure!(arguments.ops.iter().all(of), "ops: prefill, decode");
    let longest = arguments.tokens.iter().max().copied().unwrap_or(0) + arguments.steps;
    let shape = alone::shape(&arguments.common, longest)?;
    // Before the peers are there: theirs is the same machine.
    let machine = Machine::here();
    let mut peers = Peers::start(&arguments.python, &arguments.script)?;
    let ours = alone::decoder(&shape)?;
    let rounds = arguments.tokens.len() * arguments.ops.len() * (arguments.runs + 1);
    let bar = bar("peers", (rounds * (1 + arguments.peers.len())) as u64)?;
    let mut rows = Vec::new();
    for &tokens in &arguments.tokens {
        for op in &arguments.ops {
            let mut compared = compare(arguments, &ours, &mut peers, op, tokens, &bar)?;
            if let Some(own) = compared.first_mut() {
                own.share_of_limit = Some(share(&shape, &machine, own));
            }
            rows.extend(compared);
        }
    }
    bar.finish_and_clear();
    let report = Report {
        machine,
        shape: arguments.common.shape.clone(),
        parameters: shape.parameters(),
        rows,
        peak_rss_bytes: peak_rss_bytes(),
    };
    if arguments.common.json {
        return text::json(&report);
    }
    text::line(format_args!(
        "{}; {}, random weights; median [least, most] of {} rounds",
        report.machine.text(),
        report.shape,
        arguments.runs
    ));
    let cells = |row: &Row| {
        let others = row.others_cpus.as_ref().map_or("-".into(), |others| format!("{:.2}", others.most));
        vec![
            format!("{} {}", row.op, row.tokens),
            row.engine.clone(),
            row.dtype.clone(),
            row.tokens_per_second.text(1),
            row.ratio.text(2),
            row.share_of_limit.map_or("-".into(), |share| format!("{:.0} %", share * 100.0)),
            others,
        ]
    };
    let header = ["", "engine", "weights", "tokens/s", "ours / it", "of limit", "others' CPUs"];
    text::table(&header, &report.rows.iter().map(cells).collect::<Vec<_>>());
    Ok(ExitCode::SUCCESS)
}

/// How near our engine comes to what the machine can do.
fn share(shape: &Config, machine: &Machine, row: &Row) -> f64 {
    let (tokens, rate) = (row.tokens as f64, row.tokens_per_second.median);
    if row.op == "decode" {
        // bf16 weights, the output head among them; f32 keys and values.
        let table = shape.vocab * shape.hidden;
        let weights = shape.parameters() - if shape.tied { 0 } else { table };
        let kv_width = (shape.layers * shape.kv_heads * shape.head_dim) as f64;
        let bytes = 2.0 * weights as f64 + 8.0 * kv_width * tokens;
        return bytes * rate / machine.limits.read_bytes;
    }
    operations(shape, 0, row.tokens, End::Token) / tokens * rate / machine.limits.flops
}

/// All engines on one operation. The first round is thrown away: it loads and warms.
fn compare(
    arguments: &Arguments,
    ours: &Decoder<Cpu>,
    peers: &mut Peers,
    op: &str,
    tokens: usize,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Row>> {
    let mut bench = Ours::new(ours, tokens, arguments.steps)?;
    let mut seen: Vec<Seen> = (0..=arguments.peers.len()).map(|_| Seen::default()).collect();
    for round in 0..=arguments.runs {
        let rate = if op == "prefill" { bench.prefill()? } else { bench.decode()? };
        bar.inc(1);
        let mut answers = Vec::new();
        for peer in &arguments.peers {
            bar.set_message(format!("{op} {tokens} {peer}"));
            let request = json!({
                "peer": peer.trim_end_matches("-plain"), "shape": arguments.common.shape, "op": op, "tokens": tokens,
                "steps": arguments.steps, "threads": arguments.common.threads, "flash_attention": !peer.ends_with("-plain"),
            });
            answers.push(peers.ask(&request)?);
            bar.inc(1);
        }
        if round == 0 {
            continue;
        }
        seen[0].rates.push(rate);
        for (seen, answer) in seen[1..].iter_mut().zip(answers) {
            let number = |name: &str| answer.get(name).and_then(serde_json::Value::as_f64);
            let words = |name: &str| answer.get(name).and_then(|v| v.as_str()).unwrap_or("").to_owned();
            seen.rates.push(number("tokens_per_second").context("tokens_per_second")?);
            seen.others.extend(number("others_cpus"));
            (seen.version, seen.dtype) = (words("peer_version"), words("dtype"));
        }
    }
    (seen[0].version, seen[0].dtype) = (env!("CARGO_PKG_VERSION").into(), "f32".into());
    let our_rates = seen[0].rates.clone();
    let names = std::iter::once("cacheclip").chain(arguments.peers.iter().map(String::as_str));
    let row = |(engine, seen): (&str, Seen)| Row {
        op: op.to_owned(),
        tokens,
        engine: engine.to_owned(),
        version: seen.version,
        dtype: seen.dtype,
        ratio: Runs::of(our_rates.iter().zip(&seen.rates).map(|(ours, theirs)| ours / theirs).collect()),
        tokens_per_second: Runs::of(seen.rates),
        share_of_limit: None,
        others_cpus: (!seen.others.is_empty()).then(|| Runs::of(seen.others)),
    };
    Ok(names.zip(seen).map(row).collect())
}

/// Our engine on one sequence.
struct Ours<'a> {
    alone: Alone<'a>,
    steps: usize,
    filled: bool,
}

impl<'a> Ours<'a> {
    fn new(decoder: &'a Decoder<Cpu>, tokens: usize, steps: usize) -> anyhow::Result<Self> {
        Ok(Self { alone: Alone::new(decoder, tokens + steps)?, steps, filled: false })
    }

    /// Prompt tokens per second, logits of the last one included.
    fn prefill(&mut self) -> anyhow::Result<f64> {
        let tokens = self.alone.tokens() - self.steps;
        let began = Instant::now();
        self.pass(0..tokens)?;
        self.filled = true;
        Ok(tokens as f64 / began.elapsed().as_secs_f64())
    }

    /// Tokens per second with the prompt in the cache.
    fn decode(&mut self) -> anyhow::Result<f64> {
        if !self.filled {
            self.prefill()?;
        }
        let (tokens, began) = (self.alone.tokens(), Instant::now());
        for at in tokens - self.steps..tokens {
            self.pass(at..at + 1)?;
        }
        Ok(self.steps as f64 / began.elapsed().as_secs_f64())
    }

    fn pass(&mut self, rows: std::ops::Range<usize>) -> anyhow::Result<()> {
        std::hint::black_box(self.alone.pass(rows, |pass| Pass { logits: Logits::Last, ..pass })?);
        Ok(())
    }
}
