//! Every kernel against the CPU's: the comparisons of `crates/kernels/tests/cuda_gpu.rs`, as the program of tests that the
//! package brings, each in a process of its own.

use crate::budget::Deadline;
use crate::conduct::end_within;
use crate::work::Work;
use anyhow::Context as _;
use serde::Serialize;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Longest time for one comparison, in seconds.
const LONGEST: f64 = 60.0;
/// Lines of a failure that are kept.
const LINES: usize = 12;

#[derive(Debug, Serialize)]
struct Row {
    row: &'static str,
    name: String,
    passed: bool,
    /// What it said, where it failed.
    said: Vec<String>,
}

/// Runs `program`'s tests. `kept` and `libraries` as of a toolkit.
///
/// # Errors
/// There is no such program, or it has no tests.
pub fn run(work: &Work, program: &Path, libraries: Option<&Path>, kept: Option<&Path>) -> anyhow::Result<()> {
    let listed = Command::new(program)
        .args(["--list", "--format", "terse"])
        .output()
        .with_context(|| format!("{}: scripts/cuda-build puts it beside this program", program.display()))?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let names: Vec<&str> = listed.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    anyhow::ensure!(!names.is_empty(), "{} has no tests", program.display());
    for name in names {
        // What was not compared has not passed.
        anyhow::ensure!(!work.deadline.passed(), "no time is left for {name} and those behind it");
        let row = one(work, program, name, libraries, kept)?;
        work.say(format_args!("{name}: {}", if row.passed { "passed" } else { "FAILED" }));
        work.row(&row)?;
    }
    Ok(())
}

fn one(
    work: &Work,
    program: &Path,
    name: &str,
    libraries: Option<&Path>,
    kept: Option<&Path>,
) -> anyhow::Result<Row> {
    let mut command = Command::new(program);
    // A test that is skipped would pass for nothing.
    command.args(["--exact", name, "--nocapture"]).env("NEED_GPU", "1");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.envs(libraries.map(|folder| ("CUDA_LIBRARIES", folder)));
    command.envs(kept.map(|folder| ("CUDA_KERNELS", folder)));
    let mut child = command.spawn()?;
    let readers = [
        child.stdout.take().map(|out| Box::new(out) as Box<dyn std::io::Read + Send>),
        child.stderr.take().map(|err| Box::new(err) as Box<dyn std::io::Read + Send>),
    ];
    let (status, texts) = std::thread::scope(|scope| {
        let reading = readers.map(|reader| {
            scope.spawn(move || {
                let mut bytes = Vec::new();
                // What was read before a fault is what there is.
                _ = reader.map(|mut reader| reader.read_to_end(&mut bytes));
                String::from_utf8_lossy(&bytes).into_owned()
            })
        });
        let status = end_within(&mut child, Deadline::within(work.deadline.left().min(LONGEST)));
        (status, reading.map(|reading| reading.join().unwrap_or_default()))
    });
    let status = status?;
    // One of one: a name that nothing answers to must not pass.
    let passed = status.is_some_and(|status| status.success()) && texts[0].contains("1 passed");
    let mut said: Vec<String> = texts.iter().flat_map(|text| text.lines()).map(str::to_owned).collect();
    if status.is_none() {
        said.push(format!("stopped after {LONGEST} s"));
    }
    let said = if passed { Vec::new() } else { said.split_off(said.len().saturating_sub(LINES)) };
    Ok(Row { row: "check", name: name.to_owned(), passed, said })
}
