//! Processes that a benchmark starts: Python peers that are asked line by line, and a cache-store.

use anyhow::Context as _;
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The peers' process; ends with its standard input.
#[derive(Debug)]
pub(crate) struct Peers {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peers {
    /// Starts `script` with `python`.
    pub(crate) fn start(python: &Path, script: &Path) -> anyhow::Result<Self> {
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
    pub(crate) fn ask(&mut self, request: &Value) -> anyhow::Result<Value> {
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

/// A cache-store in a process of its own; killed when dropped.
#[derive(Debug)]
pub(crate) struct Store {
    child: Child,
    /// Where it is dialled.
    pub(crate) endpoint: String,
}

impl Store {
    /// Starts the binary that lies beside this one, with its files in `data`.
    pub(crate) fn start(data: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?.with_file_name("cacheclip-cache-store");
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let (listen, data) =
            (format!("service.listen=127.0.0.1:{port}"), format!("data_dir={}", data.display()));
        let child = Command::new(&program)
            .args(["--set", &listen, "--set", "service.admin_listen=127.0.0.1:0", "--set", &data])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| {
                format!("{}: build it with cargo build --release --workspace --bins", program.display())
            })?;
        Ok(Self { child, endpoint: format!("http://127.0.0.1:{port}") })
    }

    /// CPU seconds it has used.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        super::measure::cpu_seconds(&self.child.id().to_string())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
