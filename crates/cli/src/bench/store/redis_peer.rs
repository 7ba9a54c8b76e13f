//! Redis beside the store: a server of its own, nothing written to disk, asked through the `redis` crate.

use super::super::process::free_port;
use anyhow::Context as _;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, cmd, pipe};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for its start, and for one answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two attempts to reach it.
const PAUSE: Duration = Duration::from_millis(20);

/// A Redis that runs; killed when dropped.
pub(crate) struct Redis {
    child: Child,
    connection: MultiplexedConnection,
    _folder: tempfile::TempDir,
}

impl Redis {
    /// Starts `program` on a free port of loopback.
    pub(crate) async fn start(program: &Path) -> anyhow::Result<Self> {
        let (port, folder) = (free_port()?.to_string(), tempfile::tempdir()?);
        let settings = ["--bind", "127.0.0.1", "--port", port.as_str(), "--save", "", "--appendonly", "no"];
        let child = Command::new(program)
            .args(settings)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| program.display().to_string())?;
        let client = Client::open(format!("redis://127.0.0.1:{port}/"))?;
        match tokio::time::timeout(PATIENCE, connect(&client)).await {
            Ok(connection) => Ok(Self { child, connection, _folder: folder }),
            Err(_) => {
                stop(child);
                anyhow::bail!("{} does not answer", program.display())
            }
        }
    }

    pub(crate) async fn set(&mut self, key: &str, value: &[u8]) -> anyhow::Result<()> {
        Ok(cmd("SET").arg(key).arg(value).query_async(&mut self.connection).await?)
    }

    /// Seconds of a `GET` and of the digest of what came.
    pub(crate) async fn get_hashed(&mut self, key: &str) -> anyhow::Result<f64> {
        let began = Instant::now();
        let value: Vec<u8> = cmd("GET").arg(key).query_async(&mut self.connection).await?;
        anyhow::ensure!(!value.is_empty(), "Redis has lost {key}");
        std::hint::black_box(blake3::hash(&value));
        Ok(began.elapsed().as_secs_f64())
    }

    /// Values of several keys, asked for in one write.
    pub(crate) async fn many(&mut self, keys: &[String]) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut asked = pipe();
        keys.iter().for_each(|key| {
            asked.cmd("GET").arg(key);
        });
        Ok(asked.query_async(&mut self.connection).await?)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn stop(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

async fn connect(client: &Client) -> MultiplexedConnection {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(PATIENCE))
        .set_response_timeout(Some(PATIENCE));
    loop {
        match client.get_multiplexed_async_connection_with_config(&config).await {
            Ok(connection) => return connection,
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
