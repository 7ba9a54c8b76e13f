//! What came of a run: written to its file after every row.

use crate::parts::Part;
use crate::targets::{Target, targets};
use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// A run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Version of the program.
    pub version: String,
    /// Seconds since 1970 when it began.
    pub began: u64,
    /// Whether it was a rehearsal on the CPU: figures mean nothing then.
    pub rehearsal: bool,
    /// The host's processor, and how many of it there are.
    pub processor: String,
    /// As `processor`.
    pub processors: usize,
    /// What was wanted, beside what was measured.
    pub targets: Vec<Target>,
    /// The parts, in the order in which they were done.
    pub parts: Vec<Done>,
}

/// A part that has begun.
#[derive(Debug, Serialize, Deserialize)]
pub struct Done {
    /// Which.
    pub part: Part,
    /// How it ended.
    pub state: State,
    /// How long it took.
    pub seconds: f64,
    /// What it gave.
    pub rows: Vec<Value>,
}

/// How a part ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It has not.
    Running,
    /// By itself.
    Done,
    /// Its time was up.
    Cut,
    /// With an error, which it told on standard error.
    Failed(String),
}

impl Report {
    /// A run that begins now.
    pub fn begin(rehearsal: bool) -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find(|line| line.starts_with("model name"));
        let began = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            began: began.map_or(0, |it| it.as_secs()),
            rehearsal,
            processor: model.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown").to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            targets: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// All rows of a kind.
    pub fn rows<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.parts.iter().flat_map(|done| &done.rows).filter(move |row| row["row"] == kind)
    }

    /// Whether no part failed, and no check.
    pub fn passed(&self) -> bool {
        let failed = |row: &Value| row["passed"] == Value::Bool(false);
        let ended = |done: &Done| matches!(done.state, State::Done | State::Cut);
        self.parts.iter().all(|done| ended(done) && !done.rows.iter().any(failed))
    }

    /// Whether every one of `parts` is there, and came to its end.
    pub fn whole(&self, parts: &[Part]) -> bool {
        let done = |part| self.parts.iter().any(|it| it.part == part && it.state == State::Done);
        parts.iter().all(|&part| done(part))
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&mut self, path: &Path) -> anyhow::Result<()> {
        self.targets = targets(self);
        let beside = path.with_extension("part");
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(&beside, text)
            .and_then(|()| std::fs::rename(&beside, path))
            .with_context(|| format!("--out: cannot write {}", path.display()))
    }

    /// A few lines for people: checks that failed, targets, how parts ended.
    pub fn text(&self) -> String {
        let mut lines = Vec::new();
        for row in self.parts.iter().flat_map(|done| &done.rows).filter(|row| row["passed"] == false) {
            lines.push(format!("FAILED {} {}: {}", row["row"], row["name"], row["said"]));
        }
        for (done, row) in self.parts.iter().flat_map(|it| it.rows.iter().map(move |row| (it, row))) {
            if row["row"] == "error" {
                lines.push(format!("ERROR {}: {}", done.part.name(), row["said"]));
            }
        }
        for target in &self.targets {
            lines.push(target.text());
        }
        for done in &self.parts {
            let state = match &done.state {
                State::Failed(why) => format!("failed: {why}"),
                State::Cut => "cut".to_owned(),
                State::Running => "did not end".to_owned(),
                State::Done => "done".to_owned(),
            };
            lines.push(format!(
                "{}: {state}, {:.0} s, {} rows",
                done.part.name(),
                done.seconds,
                done.rows.len()
            ));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_run_passes_when_no_part_and_no_check_failed() {
        let done = |state, rows| Done { part: Part::Exact, state, seconds: 1.0, rows };
        let of = |parts| Report { parts, ..Report::begin(false) };
        let good = json!({ "row": "certificate", "passed": true });
        let bad = json!({ "row": "check", "name": "place", "passed": false, "said": ["off by one"] });
        assert!(of(vec![done(State::Done, vec![good.clone()]), done(State::Cut, vec![])]).passed());
        assert!(!of(vec![done(State::Failed("signal".into()), vec![good])]).passed());
        let failed = of(vec![done(State::Done, vec![bad])]);
        assert!(!failed.passed());
        assert!(failed.text().contains("FAILED") && failed.text().contains("off by one"));
    }

    #[test]
    fn a_report_is_read_back_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.json");
        let mut report = Report::begin(true);
        report.parts.push(Done { part: Part::Times, state: State::Running, seconds: 0.0, rows: vec![] });
        report.write(&path).unwrap();
        let back: Report = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((back.parts[0].part, &back.parts[0].state), (Part::Times, &State::Running));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(report.write(Path::new("/no/such/folder/out.json")).is_err());
    }
}
