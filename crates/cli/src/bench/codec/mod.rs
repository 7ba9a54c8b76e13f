//! `cacheclip bench codec`: ways to store KV, how small each makes it, and how fast on one core.
//!
//! One way is better than another where a link and a core bring more KV per second with it: stored bytes over the link,
//! then their digest, then decoding, one after the other. A link that is not busy while a core decodes only favours
//! what makes KV smaller.

mod kv;
mod ways;

use super::bar;
use super::measure::{Machine, Runs, use_threads};
use crate::text;
use cacheclip_chunk::{Codec, Dtype};
use indicatif::ProgressBar;
use kv::Sample;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use ways::{Layer, Transform, Way, Worker};

/// Arguments of `bench codec`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Directory with the models `primary/` and `aux/`.
    #[arg(long, default_value = "models/tiny")]
    models: PathBuf,
    /// Shapes of random weights.
    #[arg(long, value_delimiter = ',', default_value = "smollm2-135m")]
    shapes: Vec<String>,
    /// Tokens of a chunk.
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Rounds.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Billions of bytes per second of the link that ways are compared over.
    #[arg(long, default_value_t = 1.0)]
    link_gb_per_s: f64,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    link_gb_per_s: f64,
    rows: Vec<Row>,
    verdicts: Vec<Verdict>,
}

/// One way on one sample.
#[derive(Debug, Serialize)]
struct Row {
    sample: String,
    dtype: &'static str,
    way: String,
    /// What containers are written with unless a writer says otherwise.
    default: bool,
    raw_bytes: usize,
    stored_bytes: usize,
    /// Stored over raw bytes.
    ratio: f64,
    /// Of raw bytes, one core.
    encode_gb_per_s: Runs,
    decode_gb_per_s: Runs,
    /// Raw bytes per second of a load over the link.
    load_gb_per_s: Runs,
}

/// What is best of one sample, by the median of the loads.
#[derive(Debug, Serialize)]
struct Verdict {
    sample: String,
    dtype: &'static str,
    best: String,
    /// Loads with the default over loads with the best.
    default_over_best: f64,
}

/// What one round of one way took.
#[derive(Clone, Copy, Debug, Default)]
struct Turn {
    stored: usize,
    encode: f64,
    verify: f64,
    decode: f64,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(arguments.runs > 0 && arguments.tokens > 0, "runs, tokens: at least 1");
    anyhow::ensure!(arguments.link_gb_per_s > 0.0, "link-gb-per-s: more than 0");
    // One core.
    use_threads(1)?;
    let mut samples = Vec::new();
    for model in ["primary", "aux"] {
        samples.push(Sample::of_text(&arguments.models, model, arguments.tokens)?);
    }
    for shape in &arguments.shapes {
        samples.push(Sample::of_shape(shape, arguments.tokens)?);
    }
    let (ways, dtypes) = (Way::all(), [Dtype::Bf16, Dtype::F16, Dtype::F32]);
    let bar = bar("codec", (samples.len() * dtypes.len() * ways.len() * (arguments.runs + 1)) as u64)?;
    let (mut rows, mut verdicts) = (Vec::new(), Vec::new());
    for sample in &samples {
        for dtype in dtypes {
            let measured = measure(arguments, sample, dtype, &ways, &bar)?;
            verdicts.extend(verdict(&measured));
            rows.extend(measured);
        }
    }
    bar.finish_and_clear();
    let machine = Machine::here();
    let report = Report { machine, link_gb_per_s: arguments.link_gb_per_s, rows, verdicts };
    if arguments.json {
        return text::json(&report);
    }
    report.print(arguments.runs);
    Ok(ExitCode::SUCCESS)
}

/// All ways on one sample, in turns. The first round is thrown away.
fn measure(
    arguments: &Arguments,
    sample: &Sample,
    dtype: Dtype,
    ways: &[Way],
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Row>> {
    let layers = sample.layers(dtype);
    let shape = Layer { tokens: sample.tokens(), head_dim: sample.head_dim, dtype };
    let mut worker = Worker::new()?;
    let mut turns: Vec<Vec<Turn>> = ways.iter().map(|_| Vec::new()).collect();
    for round in 0..=arguments.runs {
        for (way, turns) in ways.iter().zip(&mut turns) {
            bar.set_message(format!("{dtype} {}", way.name()));
            let turn = turn(&mut worker, *way, &layers, shape)?;
            bar.inc(1);
            if round > 0 {
                turns.push(turn);
            }
        }
    }
    let raw_bytes: usize = layers.iter().map(Vec::len).sum();
    let rate = |turns: &[Turn], seconds: &dyn Fn(&Turn) -> f64| {
        Runs::of(turns.iter().map(|turn| raw_bytes as f64 / 1e9 / seconds(turn)).collect())
    };
    let link = arguments.link_gb_per_s * 1e9;
    let row = |(way, turns): (&Way, Vec<Turn>)| {
        let stored_bytes = turns.first().map_or(0, |turn| turn.stored);
        Row {
            sample: sample.name.clone(),
            dtype: dtype.name(),
            way: way.name(),
            default: is_default(*way),
            raw_bytes,
            stored_bytes,
            ratio: stored_bytes as f64 / raw_bytes as f64,
            encode_gb_per_s: rate(&turns, &|turn| turn.encode),
            decode_gb_per_s: rate(&turns, &|turn| turn.decode),
            load_gb_per_s: rate(&turns, &|turn| turn.stored as f64 / link + turn.verify + turn.decode),
        }
    };
    Ok(ways.iter().zip(turns).map(row).collect())
}

/// Layer by layer, as containers are written and read. A layer that would hardly shrink is stored as it is.
fn turn(worker: &mut Worker, way: Way, layers: &[Vec<u8>], shape: Layer) -> anyhow::Result<Turn> {
    let (mut turn, raw_way) = (Turn::default(), Way { transform: Transform::None, level: None });
    for raw in layers {
        let began = Instant::now();
        let packed = worker.encode(way, raw, shape)?;
        turn.encode += began.elapsed().as_secs_f64();
        let (used, stored) = match packed.len() * 20 <= raw.len() * 19 {
            true => (way, &packed),
            false => (raw_way, raw),
        };
        turn.stored += stored.len();
        let began = Instant::now();
        std::hint::black_box(blake3::hash(stored));
        turn.verify += began.elapsed().as_secs_f64();
        let began = Instant::now();
        let back = worker.decode(used, stored, raw.len(), shape)?;
        turn.decode += began.elapsed().as_secs_f64();
        anyhow::ensure!(back == *raw, "{} does not give back what it was given", way.name());
    }
    Ok(turn)
}

fn is_default(way: Way) -> bool {
    match Codec::default() {
        Codec::Raw => way.level.is_none(),
        Codec::BytePlaneZstd { level } => way.transform == Transform::Planes && way.level == Some(level),
    }
}

fn verdict(rows: &[Row]) -> Option<Verdict> {
    let load = |row: &Row| row.load_gb_per_s.median;
    let best = rows.iter().max_by(|a, b| load(a).total_cmp(&load(b)))?;
    let default = rows.iter().find(|row| row.default)?;
    Some(Verdict {
        sample: best.sample.clone(),
        dtype: best.dtype,
        best: best.way.clone(),
        default_over_best: load(default) / load(best),
    })
}

impl Report {
    fn print(&self, runs: usize) {
        let (machine, link) = (self.machine.text(), self.link_gb_per_s);
        text::line(format_args!("{machine}; one core, median [least, most] of {runs} rounds"));
        let cells = |row: &Row| {
            vec![
                format!("{} {}{}", row.dtype, row.way, if row.default { " (default)" } else { "" }),
                row.sample.clone(),
                format!("{:.3}", row.ratio),
                row.encode_gb_per_s.text(2),
                row.decode_gb_per_s.text(2),
                row.load_gb_per_s.text(2),
            ]
        };
        let header = ["", "KV of", "stored / raw", "encode GB/s", "decode GB/s", "load GB/s"];
        text::table(&header, &self.rows.iter().map(cells).collect::<Vec<_>>());
        for Verdict { sample, dtype, best, default_over_best } in &self.verdicts {
            let share = default_over_best * 100.0;
            text::line(format_args!(
                "{sample}, {dtype}: best over {link} GB/s is {best}; the default loads {share:.0} % as fast"
            ));
        }
    }
}
