//! `cacheclip verify`: whether the containers of a data directory or of a bucket are what was written.

use crate::text;
use anyhow::Context as _;
use cacheclip_cache_store::verify::{Finding, Listing, Report};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Exit code where something is damaged.
const DAMAGED: u8 = 1;
/// Exit code where something could not be read.
const UNREADABLE: u8 = 2;
/// Longest wait for an answer of a bucket.
const PATIENCE: Duration = Duration::from_secs(30);

/// Arguments of `verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A store's `data_dir`, or the URL of its `bucket` with or without the node's name: s3://NAME/PREFIX/NODE. The
    /// store need not run, and may: containers that come or go meanwhile are no damage, and puts under way show as
    /// leftovers.
    #[arg(value_name = "DIR|URL")]
    place: String,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(arguments: &Arguments) -> ExitCode {
    match check(arguments).await {
        Ok(report) if report.is_damaged() => ExitCode::from(DAMAGED),
        Ok(report) if report.is_complete() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(UNREADABLE),
        Err(error) => text::fail(&error, UNREADABLE),
    }
}

async fn check(Arguments { place, json }: &Arguments) -> anyhow::Result<Report> {
    let listed = match place.contains("://") {
        true => Listing::bucket(place, PATIENCE).await,
        false => Listing::directory(Path::new(place)),
    };
    let listed = listed.with_context(|| place.clone())?;
    let bar = ProgressBar::new(listed.bytes());
    bar.set_style(
        ProgressStyle::with_template("[{bar:40}] {bytes}/{total_bytes} {eta}")?.progress_chars("=> "),
    );
    let report = listed.check(&|bytes| bar.inc(bytes));
    bar.finish_and_clear();
    if *json {
        text::json(&report)?;
    } else {
        print(&report);
    }
    Ok(report)
}

fn print(report: &Report) {
    if !report.findings.is_empty() {
        let rows: Vec<Vec<String>> = report
            .findings
            .iter()
            .map(|found| {
                vec![found.path.display().to_string(), found.bytes.to_string(), tell(&found.finding)]
            })
            .collect();
        text::table(&["file", "bytes", "finding"], &rows);
    }
    text::line(format_args!("{} containers are good, of {} bytes of files", report.good, report.bytes));
}

fn tell(finding: &Finding) -> String {
    match finding {
        Finding::DamagedSegments { segments } => {
            let segments: Vec<String> = segments.iter().map(usize::to_string).collect();
            format!("DAMAGED in segment {}", segments.join(", "))
        }
        Finding::DamagedContainer { why } => format!("DAMAGED: {why}"),
        Finding::DamagedPadding => "DAMAGED between segments".into(),
        Finding::OtherKey { holds } => format!("DAMAGED: it holds {holds}"),
        Finding::WrongFolder => "DAMAGED: in a folder where no store looks for it".into(),
        Finding::UnknownVersion { version } => format!("format version {version}, of another release"),
        Finding::ForeignName => "not a store's".into(),
        Finding::Quarantined => "set aside by a store because it is damaged".into(),
        Finding::Leftover => "left by a put that broke off, or under way".into(),
        Finding::Unreadable { why } => format!("NOT READ: {why}"),
    }
}
