//! A fleet of real processes: one gateway, two cache-stores, one scorer, two workers, a redis-server.

use crate::process::{Process, Program, free_port};
use crate::until;
use std::net::SocketAddr;
use std::path::PathBuf;
use tempfile::TempDir;

/// The processes; all end with it.
#[derive(Debug)]
pub struct Fleet {
    /// The one gateway.
    pub gateway: Process,
    /// Two workers with next to no RAM tier, so that every request reads from the stores.
    pub workers: Vec<Process>,
    /// One scorer, or as many as the shape says.
    pub scorers: Vec<Process>,
    /// Two stores.
    pub stores: Vec<Process>,
    /// The stores' index.
    pub redis: Process,
    /// Data and logs.
    pub dir: TempDir,
    shape: Shape,
}

/// How a fleet differs from the default one.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Bytes of each worker's RAM tier.
    pub worker_ram: u64,
    /// Workers to start.
    pub workers: usize,
    /// Scorers to start.
    pub scorers: usize,
    /// How long gateways wait for importance sets.
    pub score_timeout_seconds: f64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { worker_ram: 1, workers: 2, scorers: 1, score_timeout_seconds: 2.0 }
    }
}

/// Where Debian and others put redis-server; `None` (and a line that says so) where it is not installed.
pub fn redis_server() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join("redis-server")).find(|path| path.is_file());
    if found.is_none() {
        #[allow(clippy::print_stderr, reason = "a skipped test prints why")]
        {
            eprintln!("skipped: redis-server is not installed (apt-get install redis-server)");
        }
    }
    found
}

impl Fleet {
    /// Starts a fleet and waits until all of it is ready; `None` where there is no redis-server.
    ///
    /// # Panics
    /// When a process does not start.
    pub async fn start(shape: Shape) -> Option<Self> {
        let program = redis_server()?;
        let dir = tempfile::tempdir().expect("a directory");
        let redis = start_redis(program, &dir);
        let redis_url = format!("redis://{}", redis.grpc);
        let mut stores: Vec<Process> = (0..2)
            .map(|n| {
                let settings = [
                    format!("node=store-{n}"),
                    format!("data_dir={}", dir.path().join(format!("store-{n}")).display()),
                    "index.kind=redis".into(),
                    format!("index.urls=[\"{redis_url}\"]"),
                    "index.lease_seconds=3".into(),
                ];
                Process::service("cacheclip-cache-store", dir.path(), &settings)
            })
            .collect();
        let at_stores = format!("stores={}", endpoints(&stores));
        let mut scorers: Vec<Process> = (0..shape.scorers)
            .map(|_| Process::service("cacheclip-aux-scorer", dir.path(), std::slice::from_ref(&at_stores)))
            .collect();
        let ram = format!("ram_bytes={}", shape.worker_ram);
        // Tests count hits; a tiny model's KV may be computed sooner than it is loaded.
        let settings = [at_stores, ram, "loading=\"always\"".into()];
        let mut workers: Vec<Process> = (0..shape.workers)
            .map(|_| Process::service("cacheclip-gpu-worker", dir.path(), &settings))
            .collect();
        let mut gateway = start_gateway(&dir, &shape, &workers, &scorers);
        let all = stores.iter_mut().chain(&mut workers).chain(&mut scorers).chain([&mut gateway]);
        for process in all {
            process.ready().await;
        }
        // Ready with one store, they would keep every chunk there until they hear of the other.
        for process in workers.iter().chain(&scorers) {
            let heard = async || process.metric("cacheclip_client_live_stores").await == Some(2.0);
            until("workers and scorers know both stores", heard).await;
        }
        Some(Self { gateway, workers, scorers, stores, redis, dir, shape })
    }

    /// One more gateway in front of the same workers and scorers, ready.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn another_gateway(&self) -> Process {
        let mut gateway = start_gateway(&self.dir, &self.shape, &self.workers, &self.scorers);
        gateway.ready().await;
        gateway
    }
}

/// A configuration's list of these processes' endpoints.
fn endpoints(of: &[Process]) -> String {
    let all: Vec<String> = of.iter().map(|process| format!("\"{}\"", process.endpoint())).collect();
    format!("[{}]", all.join(","))
}

fn start_gateway(dir: &TempDir, shape: &Shape, workers: &[Process], scorers: &[Process]) -> Process {
    let settings = [
        format!("workers={}", endpoints(workers)),
        format!("scorers={}", endpoints(scorers)),
        format!("score_timeout_seconds={:?}", shape.score_timeout_seconds),
    ];
    Process::service("cacheclip-gateway", dir.path(), &settings)
}

fn start_redis(program: PathBuf, dir: &TempDir) -> Process {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let arguments = [
        ["--port", &address.port().to_string()],
        ["--bind", "127.0.0.1"],
        ["--save", ""],
        ["--appendonly", "no"],
        ["--dir", &dir.path().display().to_string()],
    ];
    let arguments = arguments.iter().flatten().map(ToString::to_string).collect();
    Process::start("redis-server", Program::new(program, arguments), dir.path(), address, address)
}
