//! Records on disk: one JSON object a line, behind a first line that says what they are records of.

use super::Error;
use super::bench::Record;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Name of the file in the output directory.
const FILE: &str = "records.jsonl";

/// An open file of records.
#[derive(Debug)]
pub(super) struct Records {
    path: PathBuf,
    file: File,
}

impl Records {
    /// Opens the records in `dir` that `header` describes; returns those that are there.
    ///
    /// # Errors
    /// Records that are there although `resume` was not asked for, or that another run wrote; a damaged line.
    pub(super) fn open(dir: &Path, header: &Value, resume: bool) -> Result<(Self, Vec<Record>), Error> {
        let path = dir.join(FILE);
        let io = |source| Error::Io { path: path.clone(), source };
        std::fs::create_dir_all(dir).map_err(io)?;
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(io(error)),
        };
        // A line that was being written when the run ended has no end.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let known = if whole == 0 { Vec::new() } else { read(&path, &text[..whole], header, resume)? };
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(io)?;
        file.set_len(whole as u64).map_err(io)?;
        let mut records = Self { path: path.clone(), file };
        if whole == 0 {
            records.line(header)?;
        }
        Ok((records, known))
    }

    /// Appends a record.
    ///
    /// # Errors
    /// The disk's.
    pub(super) fn append(&mut self, record: &Record) -> Result<(), Error> {
        self.line(record)
    }

    fn line(&mut self, value: &impl serde::Serialize) -> Result<(), Error> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let mut line = serde_json::to_string(value).map_err(|error| io(error.into()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(io)
    }
}

fn read(path: &Path, text: &str, header: &Value, resume: bool) -> Result<Vec<Record>, Error> {
    if !resume {
        return Err(Error::Settings(format!(
            "{} holds records: go on with --resume, or choose another --out",
            path.display()
        )));
    }
    let bad = |line: usize, field: &str, why: String| Error::Line {
        path: path.to_owned(),
        line: line + 1,
        field: field.to_owned(),
        why,
    };
    let mut records = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if number > 0 {
            records
                .push(serde_json::from_str(line).map_err(|error| bad(number, "record", error.to_string()))?);
            continue;
        }
        let found: Value =
            serde_json::from_str(line).map_err(|error| bad(number, "header", error.to_string()))?;
        if let Some(field) = different(&found, header) {
            let why = format!(
                "{} here, {} asked for: resume with the same settings",
                found[&field], header[&field]
            );
            return Err(bad(number, &field, why));
        }
    }
    Ok(records)
}

/// The first field in which two headers differ.
fn different(found: &Value, wanted: &Value) -> Option<String> {
    let fields = wanted.as_object().into_iter().flatten().map(|(field, _)| field);
    fields.into_iter().find(|field| found[field.as_str()] != wanted[field.as_str()]).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(index: usize) -> Record {
        Record {
            family: "vt-1".into(),
            index,
            full: 1.0,
            reused: 500,
            tokens: 520,
            outcomes: Vec::new(),
            kv_error: Default::default(),
            agreement: Vec::new(),
            seconds: Vec::new(),
        }
    }

    #[test]
    fn records_survive_a_line_cut_short_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let header = json!({ "seed": 1, "n": 3 });
        let (mut records, known) = Records::open(dir.path(), &header, false).unwrap();
        assert!(known.is_empty());
        records.append(&record(0)).unwrap();
        records.append(&record(1)).unwrap();
        let path = dir.path().join(FILE);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"family\": \"vt");
        std::fs::write(&path, &text).unwrap();
        let (mut records, known) = Records::open(dir.path(), &header, true).unwrap();
        assert_eq!(known, [record(0), record(1)]);
        records.append(&record(2)).unwrap();
        assert_eq!(Records::open(dir.path(), &header, true).unwrap().1.len(), 3);
        let error = Records::open(dir.path(), &header, false).unwrap_err().to_string();
        assert!(error.contains("--resume"), "{error}");
        let error = Records::open(dir.path(), &json!({ "seed": 2, "n": 3 }), true).unwrap_err().to_string();
        assert!(error.contains(":1: seed: 1 here, 2 asked for"), "{error}");
        std::fs::write(&path, text.replacen("\"index\":0", "\"index\":x", 1) + "\n").unwrap();
        let error = Records::open(dir.path(), &header, true).unwrap_err().to_string();
        assert!(error.contains(":2: record"), "{error}");
    }
}
