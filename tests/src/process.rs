//! One real process of the fleet, and what may be done to it.

use crate::{comes_about, until};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A port that was free a moment ago, below the range that the system gives to outgoing connections: one of those
/// could take it before the process that it is meant for has started.
///
/// # Panics
/// When this machine has none.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test binaries that run side by side begin at different places.
    let base = 20_000 + (std::process::id() % 120) as u16 * 100;
    let found = (0..12_000).find_map(|_| {
        let port = 20_000 + (base - 20_000 + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000;
        TcpListener::bind(("127.0.0.1", port)).is_ok().then_some(port)
    });
    found.expect("a free port")
}

/// Where the workspace's binaries are: beside the test that runs.
///
/// # Panics
/// When they were not built.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    let path = test.ancestors().nth(2).expect("target/release").join(name);
    assert!(path.is_file(), "{} is not built: run ./test, which builds the binaries first", path.display());
    path
}

/// What is started, and again after it was killed.
#[derive(Clone, Debug)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// All variables it sees; `None`: those of the test.
    pub environment: Option<BTreeMap<String, String>>,
    /// The directory it starts in.
    pub directory: PathBuf,
}

impl Program {
    /// Started in the repository, like by hand: defaults name directories from there.
    pub fn new(path: PathBuf, arguments: Vec<String>) -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        Self { path, arguments, environment: None, directory }
    }
}

/// A started process; killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    /// The binary's name, or the pod's.
    pub name: String,
    program: Program,
    child: Child,
    log: PathBuf,
    /// The gRPC (or Redis) port.
    pub grpc: SocketAddr,
    /// The admin port; the same as `grpc` where there is none.
    pub admin: SocketAddr,
}

impl Process {
    /// Starts a service with fixed, free ports. Its log goes into `dir`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn service(name: &str, dir: &Path, settings: &[String]) -> Self {
        let [grpc, admin] = [free_port(), free_port()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let ports = [format!("service.listen={grpc}"), format!("service.admin_listen={admin}")];
        let arguments = ports.iter().chain(settings).flat_map(|set| ["--set".to_owned(), set.clone()]);
        Self::start(name, Program::new(binary(name), arguments.collect()), dir, grpc, admin)
    }

    /// Starts any program that will listen on `grpc`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(name: &str, program: Program, dir: &Path, grpc: SocketAddr, admin: SocketAddr) -> Self {
        let log = dir.join(format!("{name}-{}.log", grpc.port()));
        let child = spawn(&program, &log);
        Self { name: name.to_owned(), program, child, log, grpc, admin }
    }

    /// `http://` and the gRPC port.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// Waits until the admin port says ready.
    ///
    /// # Panics
    /// When the process ends instead, with its log.
    pub async fn ready(&mut self) {
        let admin = self.admin;
        self.until("ready", async || {
            get(admin, "/ready").await.is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
        })
        .await;
    }

    /// Waits for something about this process.
    ///
    /// # Panics
    /// When it does not come about, or the process ends instead; with its log.
    pub async fn until(&mut self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let mut ended = None;
        let came = comes_about(async || {
            if holds().await {
                return true;
            }
            ended = self.child.try_wait().expect("a child");
            ended.is_some()
        })
        .await;
        assert!(came && ended.is_none(), "{}: not {what} (ended: {ended:?}):\n{}", self.name, self.log());
    }

    /// What the process has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal by its name: KILL, TERM, STOP, CONT.
    ///
    /// # Panics
    /// When there is no such process.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(sent.expect("kill").success(), "{} cannot be sent {name}", self.name);
    }

    /// Kills it and waits until it is gone.
    ///
    /// # Panics
    /// When there is no such process.
    pub fn kill(&mut self) {
        self.signal("KILL");
        self.child.wait().expect("its end");
    }

    /// Starts it again, as it was started.
    pub fn restart(&mut self) {
        self.child = spawn(&self.program, &self.log);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        until("the process ends", async || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        })
        .await;
        status.expect("looked at above")
    }

    /// The value of one series, as the admin port shows it; `series` is the name with its labels.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let text = get(self.admin, "/metrics").await?;
        let line = text.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == series))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// The sum of all series of a metric whose labels contain each of `labels` (`name="value"`).
    ///
    /// # Panics
    /// When the admin port does not answer.
    pub async fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let text = get(self.admin, "/metrics").await.expect("metrics");
        let of = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, rest) = series.split_once('{').unwrap_or((series, ""));
            let fits = found == name && labels.iter().all(|label| rest.contains(label));
            fits.then(|| value.parse::<f64>().ok())?
        };
        text.lines().filter_map(of).sum()
    }

    /// The body of `/ready`, whatever its status.
    pub async fn why(&self) -> String {
        let answer = get(self.admin, "/ready").await.unwrap_or_default();
        answer.rsplit("\r\n").next().unwrap_or_default().trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Stopped processes get the signal once they go on; KILL reaches them as they are.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Program, log: &Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(log).expect("a log file");
    let mut command = Command::new(&program.path);
    if let Some(environment) = &program.environment {
        command.env_clear().envs(environment);
    }
    command
        .args(&program.arguments)
        .current_dir(&program.directory)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a handle"))
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{} cannot be started: {error}", program.path.display()))
}

/// One HTTP/1.1 request; `None` where nobody answers within two seconds.
pub async fn get(address: SocketAddr, path: &str) -> Option<String> {
    let asking = async {
        let mut stream = tokio::net::TcpStream::connect(address).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    };
    tokio::time::timeout(std::time::Duration::from_secs(2), asking).await.ok()?
}
