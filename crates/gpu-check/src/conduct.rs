//! Parts in turns, each in a process of its own: its rows are read as they come, and it is ended when its time is up.

use crate::budget::{Deadline, share};
use crate::code;
use crate::parts::Part;
use crate::report::{Done, Report, State};
use anyhow::Context as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// Pause between two looks at a process.
const PAUSE: Duration = Duration::from_millis(20);
/// Seconds that a part may take beyond its time, to end the round it is in.
const GRACE: f64 = 15.0;
/// Rows that wait to be written.
const QUEUE: usize = 64;

/// How parts are started.
#[derive(Clone, Debug)]
pub struct Conduct {
    /// The program, this one.
    pub program: PathBuf,
    /// Its arguments besides those of a part.
    pub arguments: Vec<String>,
    /// Seconds for all.
    pub seconds: f64,
    /// Where the report goes.
    pub out: PathBuf,
}

impl Conduct {
    /// Does `parts`; the exit code of a first part that found nothing to run on, which is one of [`code`].
    ///
    /// # Errors
    /// The report cannot be written, or no process started.
    pub fn run(&self, parts: &[Part], report: &mut Report) -> anyhow::Result<Option<u8>> {
        let all = Deadline::within(self.seconds);
        for (index, &part) in parts.iter().enumerate() {
            let weights: Vec<f64> = parts[index..].iter().map(|part| part.weight()).collect();
            let seconds = share(all.left(), &weights);
            if all.left() < 1.0 {
                tell(format_args!("{}: no time left", part.name()));
                report.parts.push(Done { part, state: State::Cut, seconds: 0.0, rows: Vec::new() });
                continue;
            }
            tell(format_args!("{} ({seconds:.0} s)", part.name()));
            let last = index + 1 == parts.len();
            // What a part takes beyond its time is taken from those behind it; the last has nobody behind it.
            let grace = if last { GRACE.min(0.05 * self.seconds) } else { GRACE };
            let status = self.part(part, seconds, grace, report)?;
            let ended = status.and_then(|status| status.code()).and_then(|it| u8::try_from(it).ok());
            if let (0, Some(nothing @ code::NO_DEVICE..=code::BUILD)) = (index, ended) {
                return Ok(Some(nothing));
            }
        }
        Ok(None)
    }

    /// One part. `None` when it was ended from here.
    fn part(
        &self,
        part: Part,
        seconds: f64,
        grace: f64,
        report: &mut Report,
    ) -> anyhow::Result<Option<ExitStatus>> {
        let began = Instant::now();
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .args(["--part", part.name(), "--seconds", &seconds.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| self.program.display().to_string())?;
        let out = child.stdout.take().context("a part's output")?;
        let (rows, inbox) = sync_channel(QUEUE);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if rows.send(line).is_err() {
                    break;
                }
            }
        });
        report.parts.push(Done { part, state: State::Running, seconds: 0.0, rows: Vec::new() });
        let deadline = Deadline::within(seconds + grace);
        let written = loop {
            match inbox.recv_timeout(Duration::from_secs_f64(deadline.left())) {
                Ok(line) => {
                    if let Err(error) = self.keep(&line, began, report) {
                        break Err(error);
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break Ok(()),
            }
        };
        // A reader that still waits to hand a row over has nobody to hand it to.
        drop(inbox);
        let status = end_within(&mut child, deadline)?;
        // A process that the part left behind may keep its output open: then nobody waits for the reader.
        if status.is_some() {
            _ = reader.join();
        }
        written?;
        let state = match status {
            None => State::Cut,
            Some(status) if status.code() == Some(code::CUT.into()) => State::Cut,
            Some(status) if status.success() => State::Done,
            Some(status) => State::Failed(status.to_string()),
        };
        if let Some(done) = report.parts.last_mut() {
            (done.state, done.seconds) = (state, began.elapsed().as_secs_f64());
        }
        report.write(&self.out)?;
        Ok(status)
    }

    fn keep(&self, line: &str, began: Instant, report: &mut Report) -> anyhow::Result<()> {
        let Some(done) = report.parts.last_mut() else { return Ok(()) };
        // Whatever a library prints there is not a row.
        let Ok(row) = serde_json::from_str(line) else {
            tell(format_args!("{line}"));
            return Ok(());
        };
        done.rows.push(row);
        done.seconds = began.elapsed().as_secs_f64();
        report.write(&self.out)
    }
}

/// Waits for a process, and ends it when it is not done in time; then `None`.
///
/// # Errors
/// The system refuses to say.
pub fn end_within(child: &mut Child, deadline: Deadline) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if deadline.passed() {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(PAUSE);
    }
}

fn tell(text: std::fmt::Arguments<'_>) {
    // Nobody needs to listen.
    _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// The arguments that every part gets: paths as they were found.
pub fn arguments(named: &[(&str, Option<&Path>)], rehearse: bool) -> Vec<String> {
    let paths = named.iter().filter_map(|(name, path)| Some((name, (*path)?)));
    let mut all: Vec<String> =
        paths.flat_map(|(name, path)| [format!("--{name}"), path.display().to_string()]).collect();
    all.extend(rehearse.then(|| "--rehearse".to_owned()));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A part played by a shell: what it says, and how it ends.
    fn played(script: &str, seconds: f64) -> (Report, Option<ExitStatus>, serde_json::Value) {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.json");
        let arguments = vec!["-c".to_owned(), script.to_owned()];
        let conduct = Conduct { program: "/bin/sh".into(), arguments, seconds, out: out.clone() };
        let mut report = Report::begin(true);
        let status = conduct.part(Part::Times, seconds, 0.0, &mut report).unwrap();
        let file = serde_json::from_str(&std::fs::read_to_string(out).unwrap()).unwrap();
        (report, status, file)
    }

    #[test]
    fn rows_are_kept_and_noise_is_not() {
        let (report, status, file) = played(r#"echo '{"row":"place"}'; echo a library speaks"#, 60.0);
        assert!(status.unwrap().success());
        assert_eq!(report.parts[0].rows, [json!({ "row": "place" })]);
        assert_eq!(report.parts[0].state, State::Done);
        assert_eq!(file["parts"][0]["rows"][0]["row"], "place");
    }

    #[test]
    fn a_part_that_is_cut_leaves_the_rows_it_had() {
        // `exec`, so that what is ended is what sleeps.
        let (report, status, file) = played(r#"echo '{"row":"place"}'; exec sleep 600"#, 0.5);
        assert!(status.is_none());
        assert_eq!((report.parts[0].rows.len(), &report.parts[0].state), (1, &State::Cut));
        assert_eq!(file["parts"][0]["state"], "cut");
    }

    #[test]
    fn a_part_that_dies_is_a_failure_with_the_rows_it_had() {
        let (report, ..) = played(r#"echo '{"row":"place"}'; kill -9 $$"#, 60.0);
        assert!(matches!(&report.parts[0].state, State::Failed(why) if why.contains('9')));
        assert_eq!(report.parts[0].rows.len(), 1);
        assert!(!report.passed());
    }

    #[test]
    fn where_there_is_nothing_to_run_on_no_further_part_begins() {
        let folder = tempfile::tempdir().unwrap();
        let conduct = Conduct {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), "exit 80".into()],
            seconds: 60.0,
            out: folder.path().join("out.json"),
        };
        let mut report = Report::begin(true);
        assert_eq!(conduct.run(&[Part::Device, Part::Times], &mut report).unwrap(), Some(code::NO_DEVICE));
        assert_eq!(report.parts.len(), 1);
    }

    #[test]
    fn what_is_not_named_is_not_passed_on() {
        let given = arguments(&[("models", Some(Path::new("/m"))), ("python", None)], true);
        assert_eq!(given, ["--models", "/m", "--rehearse"]);
    }
}
