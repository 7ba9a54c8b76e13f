//! `cacheclip eval`: quality of reuse on a pair of models, in this process.

use crate::text;
use anyhow::Context as _;
use cacheclip_bench::eval::policies::catalogue;
use cacheclip_bench::eval::{
    self, Family, Format, Pair, Progress, Report, Row, Settings, Source, Suite, by_budget, by_family,
    read_tasks,
};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Tasks per family whose signals are compared where that is asked for.
const SIGNALS: usize = 100;

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Families, policies, ratios and tasks per family to start from.
    #[arg(long, value_enum, default_value = "quick")]
    suite: Named,
    /// Families instead of the suite's, by name.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    families: Vec<String>,
    /// Policies instead of the suite's, by name; `full` is always among them.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    policies: Vec<String>,
    /// Shares of the reused tokens to recompute, instead of the suite's.
    #[arg(long, value_delimiter = ',', value_parser = text::share, value_name = "SHARE")]
    ratios: Vec<f32>,
    /// Tasks per family instead of the suite's.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    n: Option<u32>,
    /// The same seed gives the same tasks, lots and intervals.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also compare the signals themselves with full prefill's attention, as the full suite does.
    #[arg(long)]
    signals: bool,
    /// Model directory that answers.
    #[arg(long, default_value = "models/tiny/primary", value_name = "DIR")]
    primary: PathBuf,
    /// Model directory that scores.
    #[arg(long, default_value = "models/tiny/aux", value_name = "DIR")]
    aux: PathBuf,
    /// Tasks of a file instead of generated ones.
    #[arg(long, value_name = "FILE", requires = "format", conflicts_with_all = ["families", "n"])]
    tasks: Option<PathBuf>,
    /// The file's form.
    #[arg(long, value_enum, requires = "tasks")]
    format: Option<FileFormat>,
    /// Longest chunk that a file's contexts are cut into, in words.
    #[arg(long, default_value_t = 256, requires = "tasks")]
    chunk_words: usize,
    /// Directory for records.jsonl, report.json, report.html and the drawings.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the records in --out.
    #[arg(long, requires = "out")]
    resume: bool,
    /// Print the report as JSON instead of tables.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Named {
    Quick,
    Full,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FileFormat {
    Ruler,
    Longbench,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let settings = settings(arguments)?;
    let pair = Pair::load(&arguments.primary, &arguments.aux)?;
    let bar = ProgressBar::new(0);
    bar.set_style(
        ProgressStyle::with_template("tasks [{bar:40}] {pos}/{len}, {eta} to go")?.progress_chars("=> "),
    );
    let report = eval::run(&pair, &settings, &mut |Progress { done, total }| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let report = report?;
    if let Some(dir) = &settings.out {
        write(dir, &report)?;
    }
    if arguments.json {
        text::json(&report)?;
    } else {
        print(&report);
    }
    Ok(ExitCode::SUCCESS)
}

fn settings(arguments: &Arguments) -> anyhow::Result<Settings> {
    let suite = match arguments.suite {
        Named::Quick => Suite::Quick,
        Named::Full => Suite::Full,
    };
    let source = match (&arguments.tasks, arguments.format) {
        (Some(path), Some(format)) => {
            let format = match format {
                FileFormat::Ruler => Format::Ruler,
                FileFormat::Longbench => Format::LongBench,
            };
            Source::Tasks(read_tasks(path, format, arguments.chunk_words)?)
        }
        _ if arguments.families.is_empty() => Source::Families(suite.families()),
        _ => Source::Families(arguments.families.iter().map(|name| family(name)).collect::<Result<_, _>>()?),
    };
    let all = catalogue(&[]);
    // Policies that need to know the decisive statements have nothing to go by in a file.
    let usable = all.iter().filter(|policy| arguments.tasks.is_none() || policy.name() != "chain");
    let mut policies = match arguments.policies.is_empty() {
        true => suite.policies(usable.map(|policy| policy.name().to_owned()).collect()),
        false => arguments.policies.clone(),
    };
    if !policies.iter().any(|name| name == "full") {
        policies.insert(0, "full".into());
    }
    let ratios = if arguments.ratios.is_empty() { suite.ratios() } else { arguments.ratios.clone() };
    let agreement = match (arguments.signals, &arguments.tasks) {
        (_, Some(_)) => 0,
        (true, None) => SIGNALS,
        (false, None) => suite.agreement(),
    };
    Ok(Settings {
        suite: suite.name().to_owned(),
        source,
        policies,
        ratios,
        n: arguments.n.map_or(suite.n(), |n| n as usize),
        seed: arguments.seed,
        agreement,
        out: arguments.out.clone(),
        resume: arguments.resume,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
    })
}

fn family(name: &str) -> anyhow::Result<Family> {
    let names = Family::ALL.map(Family::name).join(", ");
    Family::named(name).with_context(|| format!("unknown family {name:?}: choose from {names}"))
}

fn write(dir: &Path, report: &Report) -> anyhow::Result<()> {
    let put = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())
    };
    put("report.json", serde_json::to_string_pretty(report)? + "\n")?;
    put("report.html", eval::page(report)?)?;
    for (name, drawing) in [("by-budget.svg", by_budget(report)?), ("by-family.svg", by_family(report)?)] {
        if let Some(svg) = drawing {
            put(name, svg)?;
        }
    }
    Ok(())
}

fn print(report: &Report) {
    text::line(format_args!(
        "suite {}, seed {}; primary {}, auxiliary {}",
        report.suite, report.seed, report.primary, report.aux
    ));
    let rows: Vec<Vec<String>> = report.rows.iter().map(cells).collect();
    text::table(&["family", "policy", "asked", "realised", "accuracy", "% of full", "95 %", "n"], &rows);
    for family in report.families.iter().filter(|family| !family.answerable) {
        text::line(format_args!(
            "{}: full attention itself gets {:.1} %; left out of pooled rows",
            family.family,
            100.0 * family.full_accuracy
        ));
    }
    for it in report.differences.iter().filter(|it| it.best_rival) {
        let interval =
            it.interval.map_or_else(String::new, |at| format!(" [{:+.1}, {:+.1}]", at.low, at.high));
        text::line(format_args!(
            "at {:.0} %: {} less the best rival {}: {:+.1} points{interval}, n = {}",
            100.0 * it.ratio,
            it.policy,
            it.rival,
            it.points,
            it.n
        ));
    }
    let seconds: Vec<String> =
        report.seconds.iter().map(|(stage, seconds)| format!("{stage} {seconds:.1} s")).collect();
    text::line(seconds.join(", "));
}

fn cells(row: &Row) -> Vec<String> {
    let percent = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.1}"));
    vec![
        row.family.clone(),
        row.policy.clone(),
        row.ratio.map_or_else(|| "-".into(), |ratio| format!("{:.0} %", 100.0 * ratio)),
        format!("{:.1} %", 100.0 * row.realised_ratio),
        format!("{:.3}", row.accuracy),
        percent(row.pct_of_full),
        format!("[{}, {}]", percent(row.ci_low), percent(row.ci_high)),
        row.n.to_string(),
    ]
}
