//! Other engines in a process of their own, in Python: asked and answered in JSON, line by line.

use anyhow::Context as _;
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The peers' process; ends with its standard input.
#[derive(Debug)]
pub struct Peers {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peers {
    /// Starts `script` with `python`.
    ///
    /// # Errors
    /// There is no such Python.
    pub fn start(python: &Path, script: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(python)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| {
                format!("{} (how to install it: crates/bench/peers/README.md)", python.display())
            })?;
        let (requests, answers) = (child.stdin.take(), child.stdout.take());
        let answers = BufReader::new(answers.context("the peers' output")?);
        Ok(Self { child, requests, answers })
    }

    /// Sends one request and waits for its answer.
    ///
    /// # Errors
    /// The script has ended, or says what is wrong.
    pub fn ask(&mut self, request: &Value) -> anyhow::Result<Value> {
        let requests = self.requests.as_mut().context("the peers have ended")?;
        writeln!(requests, "{request}")?;
        requests.flush()?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let answer: Value =
            serde_json::from_str(&line).with_context(|| format!("peers answered {line:?}"))?;
        match answer.get("error").and_then(Value::as_str) {
            Some(error) => anyhow::bail!("{request}: {error}"),
            None => Ok(answer),
        }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        // The end of its input ends it.
        drop(self.requests.take());
        let _ = self.child.wait();
    }
}
