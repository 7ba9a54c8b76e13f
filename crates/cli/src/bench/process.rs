//! A cache-store that a benchmark starts.

use anyhow::Context as _;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::{StatRequest, StatResponse};
use cacheclip_service::ConnectOptions;
use std::io::{Read as _, Seek as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tonic::transport::Channel;

/// Longest wait for a store to answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Pause between two attempts to reach one that starts.
const PAUSE: Duration = Duration::from_millis(20);
/// Bytes that a store keeps in RAM: longer prompts' chunks than are measured.
const STORE_RAM: u64 = 4 << 30;

/// A free port of loopback. Someone else may take it before it is used; that shows at once.
pub(crate) fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A cache-store in a process of its own; killed when dropped.
#[derive(Debug)]
pub(crate) struct Store {
    child: Child,
    client: CacheClient<Channel>,
    /// Where it is dialled.
    pub(crate) endpoint: String,
}

impl Store {
    /// Starts the binary that lies beside this one, with its files in `data`; it answers when this returns. Others
    /// dial it at `advertise`, where that is not the port itself.
    pub(crate) async fn start(data: &Path, port: u16, advertise: Option<String>) -> anyhow::Result<Self> {
        let endpoint = advertise.unwrap_or_else(|| format!("http://127.0.0.1:{port}"));
        let settings = [format!("advertise={endpoint}"), format!("ram_bytes={STORE_RAM}")];
        Self::start_with(data, port, endpoint, &settings, PATIENCE).await
    }

    /// The same with other settings, dialled at `endpoint`, and with another patience until it answers.
    pub(crate) async fn start_with(
        data: &Path,
        port: u16,
        endpoint: String,
        settings: &[String],
        patience: Duration,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?.with_file_name("cacheclip-cache-store");
        let direct = format!("http://127.0.0.1:{port}");
        let own = [format!("service.listen=127.0.0.1:{port}"), format!("data_dir={}", data.display())];
        let mut log = tempfile::tempfile()?;
        let mut command = Command::new(&program);
        command
            .args(own.iter().chain(settings).flat_map(|setting| ["--set", setting]))
            .stdout(Stdio::null())
            .stderr(log.try_clone()?);
        // What is measured is this configuration, not what the caller's environment would make of it.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with(cacheclip_service::config::ENV_PREFIX) {
                command.env_remove(name);
            }
        }
        let child = command.spawn().with_context(|| {
            format!("{}: build it with cargo build --release --workspace --bins", program.display())
        })?;
        let client = CacheClient::new(cacheclip_service::connect(&direct, &ConnectOptions::default())?);
        let mut store = Self { child, client, endpoint };
        let answered = tokio::time::timeout(patience, store.answers()).await;
        if let Err(error) = answered.context("the cache-store does not answer").and_then(|ended| ended) {
            let mut says = String::new();
            log.rewind()?;
            log.read_to_string(&mut says)?;
            return Err(error.context(format!("it says: {}", says.trim())));
        }
        Ok(store)
    }

    /// Returns when it answers; fails when it has ended.
    async fn answers(&mut self) -> anyhow::Result<()> {
        while self.stat().await.is_err() {
            if let Some(status) = self.child.try_wait()? {
                anyhow::bail!("the cache-store did not start: {status}");
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// What it holds, asked directly and not through a link.
    pub(crate) async fn stat(&self) -> anyhow::Result<StatResponse> {
        let mut client = self.client.clone();
        let answer = tokio::time::timeout(PATIENCE, client.stat(StatRequest {}));
        Ok(answer.await.context("the cache-store does not answer")??.into_inner())
    }

    /// CPU seconds it has used.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        super::measure::cpu_seconds(&self.process())
    }

    /// Its number among the system's processes.
    pub(crate) fn process(&self) -> String {
        self.child.id().to_string()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
