//! `cacheclip bench scorer`: one joint pass of a question over cached auxiliary KV, beside this machine's rate of plain
//! weight products.

use super::alone::{self, Alone};
use super::bar;
use super::bed::Common;
use super::measure::{Machine, Runs};
use super::work::{End, operations};
use crate::text;
use cacheclip_model::config::Config;
use cacheclip_model::weights::Values;
use cacheclip_model::{Cpu, Decoder, Device, Logits, Pass, Probe, Reduce};
use serde::Serialize;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Rows of the products that the pass is compared with: as many as make them fastest.
const PRODUCT_ROWS: u32 = 512;
/// Time that products are repeated for.
const PRODUCTS: Duration = Duration::from_millis(200);

/// Arguments of `bench scorer`. The shape is that of the auxiliary model.
#[derive(Debug, clap::Args)]
#[command(mut_arg("shape", |shape| shape.default_value("aux-30m")))]
pub(crate) struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Auxiliary tokens of all chunks together.
    #[arg(long, value_delimiter = ',', default_value = "8192")]
    tokens: Vec<usize>,
    /// Auxiliary tokens of the question.
    #[arg(long, default_value_t = 32)]
    question: usize,
    /// Rounds.
    #[arg(long, default_value_t = 15)]
    runs: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    shape: String,
    parameters: usize,
    question: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    tokens: usize,
    /// The question through all layers, where it looks included; the rounds of closure that follow are not.
    pass_ms: Runs,
    flops_per_second: Runs,
    /// Of weight products with many rows, in the same round.
    products_flops_per_second: Runs,
    /// The pass's rate over that of the products, round by round.
    share_of_products: Runs,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let longest = arguments.tokens.iter().max().copied().unwrap_or(0) + arguments.question;
    let shape = alone::shape(&arguments.common, longest)?;
    let machine = Machine::here();
    let decoder = alone::decoder(&shape)?;
    let products = Products::new(&shape)?;
    let bar = bar("scorer", (arguments.tokens.len() * (arguments.runs + 1)) as u64)?;
    let mut rows = Vec::new();
    for &tokens in &arguments.tokens {
        rows.push(measure(&decoder, &products, tokens, arguments, || bar.inc(1))?);
    }
    bar.finish_and_clear();
    let report = Report {
        machine,
        shape: arguments.common.shape.clone(),
        parameters: shape.parameters(),
        question: arguments.question,
        rows,
    };
    if arguments.common.json {
        return text::json(&report);
    }
    text::line(format_args!(
        "{}; {}, random weights, a question of {} tokens; median [least, most] of {} rounds",
        report.machine.text(),
        report.shape,
        report.question,
        arguments.runs
    ));
    let giga =
        |runs: &Runs| format!("{:.0} [{:.0}, {:.0}]", runs.median / 1e9, runs.least / 1e9, runs.most / 1e9);
    let cells = |row: &Row| {
        vec![
            row.tokens.to_string(),
            row.pass_ms.text(0),
            giga(&row.flops_per_second),
            giga(&row.products_flops_per_second),
            row.share_of_products.text(2),
        ]
    };
    let header = ["tokens", "pass, ms", "GFLOP/s", "products, GFLOP/s", "share"];
    text::table(&header, &report.rows.iter().map(cells).collect::<Vec<_>>());
    Ok(ExitCode::SUCCESS)
}

/// Pass and products in turns; the first round is thrown away.
fn measure(
    decoder: &Decoder<Cpu>,
    products: &Products,
    tokens: usize,
    arguments: &Arguments,
    done: impl Fn(),
) -> anyhow::Result<Row> {
    let (shape, all) = (decoder.config(), tokens + arguments.question);
    let mut alone = Alone::new(decoder, all)?;
    alone.pass(0..tokens, |pass| Pass { logits: Logits::None, ..pass })?;
    let work = operations(shape, tokens, arguments.question, End::Look);
    let (mut ms, mut rates, mut plain, mut shares) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=arguments.runs {
        let product = products.rate()?;
        let mut probe = Probe::new(tokens as u32, tokens, 0..shape.layers, Reduce::Max, Reduce::Max);
        let began = Instant::now();
        alone.pass(tokens..all, |pass| Pass { logits: Logits::None, probe: Some(&mut probe), ..pass })?;
        let took = began.elapsed().as_secs_f64();
        black_box(probe.scores());
        done();
        if round == 0 {
            continue;
        }
        let rate = work / took;
        ms.push(took * 1e3);
        rates.push(rate);
        plain.push(product);
        shares.push(rate / product);
    }
    Ok(Row {
        tokens,
        pass_ms: Runs::of(ms),
        flops_per_second: Runs::of(rates),
        products_flops_per_second: Runs::of(plain),
        share_of_products: Runs::of(shares),
    })
}

/// Products of many rows with one of the shape's matrices, as large as the gate and up projections together.
struct Products {
    rows: <Cpu as Device>::Rows,
    weight: <Cpu as Device>::Matrix,
}

impl Products {
    fn new(shape: &Config) -> anyhow::Result<Self> {
        let (hidden, outputs) = (shape.hidden, 2 * shape.intermediate);
        let values =
            |count: usize| vec![Values::Given((0..count).map(|i| (i % 251) as f32 / 256.0 - 0.5).collect())];
        let table = Cpu.matrix(values(hidden * hidden), hidden, hidden)?;
        let ids: Vec<u32> = (0..PRODUCT_ROWS).map(|row| row % hidden as u32).collect();
        let weight = Cpu.matrix(values(outputs * hidden), outputs, hidden)?;
        Ok(Self { rows: Cpu.embed(&table, &ids)?, weight })
    }

    /// Operations per second.
    fn rate(&self) -> anyhow::Result<f64> {
        let (began, mut count) = (Instant::now(), 0u64);
        while began.elapsed() < PRODUCTS {
            black_box(Cpu.project(&self.rows, &self.weight)?);
            count += 1;
        }
        let each = 2 * u64::from(PRODUCT_ROWS) * (self.weight.inputs() * self.weight.outputs()) as u64;
        Ok((count * each) as f64 / began.elapsed().as_secs_f64())
    }
}
