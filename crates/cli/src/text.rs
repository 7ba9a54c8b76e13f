//! What every command prints the same way.

use serde::Serialize;
use std::io::Write as _;
use std::process::ExitCode;

/// One line on standard error, with its causes.
pub(crate) fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    let mut err = std::io::stderr().lock();
    let mut causes = Vec::new();
    for cause in error.chain() {
        causes.push(one(cause));
        // A status says what its transport's causes say, once each of them has repeated it.
        if cause.is::<tonic::Status>() {
            break;
        }
    }
    // Nobody is left to tell when standard error is closed.
    let _ = writeln!(err, "cacheclip: {}", causes.join(": "));
    ExitCode::from(code)
}

/// One cause. A status is its code and its message: the rest of it is for programs.
fn one(cause: &(dyn std::error::Error + 'static)) -> String {
    match cause.downcast_ref::<tonic::Status>() {
        Some(status) => format!("{}: {}", cacheclip_service::code_name(status.code()), status.message()),
        None => cause.to_string(),
    }
}

/// Parses a share of the command line.
pub(crate) fn share(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        // NaN is within no range.
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("a share is a number from 0 to 1".into()),
    }
}

/// A line on standard output; a reader that went away ends the output, not the work.
pub(crate) fn line(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Text without a line end, at once.
pub(crate) fn piece(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// A value as indented JSON on standard output.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<ExitCode> {
    line(serde_json::to_string_pretty(value)?);
    Ok(ExitCode::SUCCESS)
}

/// A table: the first column left-aligned, the rest right-aligned.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let render = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells
            .zip(&widths)
            .enumerate()
            .map(
                |(i, (cell, &width))| {
                    if i == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                },
            )
            .collect();
        line(padded.join("  ").trim_end());
    };
    render(&mut header.iter().copied());
    line(widths.iter().map(|&width| "-".repeat(width)).collect::<Vec<_>>().join("  "));
    for row in rows {
        render(&mut row.iter().map(String::as_str));
    }
}
