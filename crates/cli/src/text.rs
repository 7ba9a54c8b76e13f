//! What every command prints the same way.

use serde::Serialize;
use std::io::Write as _;
use std::process::ExitCode;

/// One line on standard error, with its causes.
pub(crate) fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    let mut err = std::io::stderr().lock();
    // Nobody is left to tell when standard error is closed.
    let _ = writeln!(err, "cacheclip: {error:#}");
    ExitCode::from(code)
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
