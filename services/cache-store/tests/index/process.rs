//! A store as a process of its own, with metrics that no other test moves.

use crate::common::Calls;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_service::{ConnectOptions, connect};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_cacheclip-cache-store");

pub(crate) struct Process {
    child: Child,
    client: CacheClient<Channel>,
    pub(crate) endpoint: String,
    admin: String,
    log: Arc<Mutex<String>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Calls for Process {
    fn client(&self) -> CacheClient<Channel> {
        self.client.clone()
    }
}

impl Process {
    /// Starts a store of this name with its data in `dir`, and waits until it is ready.
    pub(crate) fn start(dir: &Path, node: &str, settings: &[String]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["--log-format", "json"]);
        let fixed = [
            "service.listen=\"127.0.0.1:0\"".to_owned(),
            "service.admin_listen=\"127.0.0.1:0\"".to_owned(),
            format!("node={node:?}"),
            format!("data_dir={:?}", dir.display().to_string()),
        ];
        for setting in fixed.iter().chain(settings) {
            command.arg("--set").arg(setting);
        }
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let addresses = follow(&mut child, &log);
        let listening = addresses.recv_timeout(Duration::from_secs(60));
        let (grpc, admin) = listening.unwrap_or_else(|_| panic!("no store: {}", log.lock().unwrap()));
        let endpoint = format!("http://{grpc}");
        let client = CacheClient::new(connect(&endpoint, &ConnectOptions::default()).unwrap());
        let process = Self { child, client, endpoint, admin, log };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !process.is_ready() {
            assert!(Instant::now() < deadline, "not ready within a minute: {}", process.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        process
    }

    /// What the admin port answers, head and body.
    pub(crate) fn http(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.admin).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.http("/ready").lines().next().unwrap().contains(" 200 ")
    }

    /// The value of a series.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let text = self.http("/metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("{series} in {text}")).parse().unwrap()
    }

    /// Most bytes of memory that the process has held so far.
    #[allow(dead_code, reason = "for tests of the store itself")]
    pub(crate) fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak.unwrap().parse::<u64>().unwrap() << 10
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// SIGTERM; returns when the process has ended.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        let kill = format!("kill -TERM {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        self.child.wait().unwrap()
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Collects the log; the receiver gets the addresses of the gRPC and the admin port.
fn follow(child: &mut Child, log: &Arc<Mutex<String>>) -> mpsc::Receiver<(String, String)> {
    let (found, addresses) = mpsc::channel();
    let (lines, log) = (BufReader::new(child.stderr.take().unwrap()).lines(), Arc::clone(log));
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            if line.contains("\"listening\"") {
                let after = |mark: &str| {
                    let rest = line.split_once(mark)?.1;
                    Some(rest.split(['"', ')']).next()?.to_owned())
                };
                let pair = after("\"address\":\"").zip(after("\"admin\":\"Some("));
                // A test that gave up does not mind.
                let _ = found.send(pair.expect("addresses"));
            }
            let mut log = log.lock().unwrap();
            log.push_str(&line);
            log.push('\n');
        }
    });
    addresses
}
