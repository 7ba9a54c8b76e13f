//! The connection to Redis: one multiplexed connection, or one per node of a cluster.
//!
//! The client's own reconnection is not used, because it makes commands wait for it. Here a connection that failed
//! is gone, whatever the failure was, and commands fail at once until [`Link::connect`] has made another: a server
//! that answers too late, refuses to write or was demoted is worth nothing more than one that is gone.

use super::{Options, Unavailable};
use crate::error::Error;
use cacheclip_service::seconds;
use futures::FutureExt as _;
use futures::future::try_join_all;
use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, IntoConnectionInfo as _, Pipeline, RedisError,
    RedisResult, TlsCertificates, Value,
};
use std::fmt;
use std::time::Duration;

/// Connecting takes some round trips more than a command.
const CONNECT_TIMEOUTS: u32 = 4;
/// Pauses between attempts inside the cluster client, in milliseconds; its own begin above a second.
const CLUSTER_PAUSE: (u64, u64) = (20, 200);
/// Attempts after the first inside the cluster client: enough for slots that moved, and so few that their pauses end
/// before the default deadline does. "Refused" or "the cluster is down" tells an operator more than "timed out".
const CLUSTER_RETRIES: u32 = 3;
/// Characters of an error that are told.
const ERROR_LEN: usize = 200;

/// Commands about one key, done in their order.
pub(super) type Unit = Vec<Cmd>;

/// The connection, as it is now.
pub(super) struct Link {
    target: Target,
    /// For error messages.
    address: String,
    timeout: Duration,
    state: Mutex<State>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("address", &self.address).finish_non_exhaustive()
    }
}

// Boxed: one of each per process, and neither is small.
enum Target {
    Single(Box<Client>),
    Cluster(Box<ClusterClient>),
}

#[derive(Clone)]
enum Connection {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

struct State {
    connection: Option<Connection>,
    /// Counts connections: the failure of an earlier one says nothing of this one.
    serial: u64,
    /// Why there is none.
    why: String,
}

impl Link {
    /// Connects to nothing yet.
    pub(super) async fn open(options: &Options) -> Result<Self, Error> {
        let wrong = |field| move |error: RedisError| Error::Option { field, reason: line(&error) };
        if options.tls() {
            // An error says that this process has chosen one already.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let certificates = certificates(options).await?;
        let infos: Result<Vec<_>, _> = options.urls.iter().map(|url| info(url, options)).collect();
        let infos = infos.map_err(wrong("index.urls"))?;
        let timeout = seconds(options.timeout_seconds);
        let target = if options.cluster {
            let builder = ClusterClientBuilder::new(infos)
                .tcp_settings(TcpSettings::default().set_nodelay(true))
                .connection_timeout(timeout)
                .response_timeout(timeout)
                .min_retry_wait(CLUSTER_PAUSE.0)
                .max_retry_wait(CLUSTER_PAUSE.1)
                .retries(CLUSTER_RETRIES);
            let builder = match certificates {
                Some(certificates) => builder.certs(certificates),
                None => builder,
            };
            Target::Cluster(Box::new(builder.build().map_err(wrong("index"))?))
        } else {
            let Some(info) = infos.into_iter().next() else {
                return Err(Error::Option { field: "index.urls", reason: "is empty".into() });
            };
            Target::Single(Box::new(match certificates {
                Some(certificates) => {
                    Client::build_with_tls(info, certificates).map_err(wrong("index.ca_file"))?
                }
                None => Client::open(info).map_err(wrong("index.urls"))?,
            }))
        };
        let state = State { connection: None, serial: 0, why: "not connected yet".into() };
        Ok(Self { target, address: options.urls.join(", "), timeout, state: Mutex::new(state) })
    }

    /// Makes a connection if there is none.
    pub(super) async fn connect(&self) -> Result<(), Unavailable> {
        if self.state.lock().connection.is_some() {
            return Ok(());
        }
        let connecting = async {
            match &self.target {
                Target::Single(client) => {
                    // Every call here brings its own deadline.
                    let config =
                        AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
                    let connection = client.get_multiplexed_async_connection_with_config(&config).await?;
                    Ok(Connection::Single(connection))
                }
                Target::Cluster(client) => Ok(Connection::Cluster(client.get_async_connection().await?)),
            }
        };
        let limit = self.timeout * CONNECT_TIMEOUTS;
        let connected = match tokio::time::timeout(limit, connecting.boxed()).await {
            Ok(connected) => connected.map_err(|error: RedisError| line(&error)),
            Err(_) => Err(format!("no connection within {limit:?}")),
        };
        let mut state = self.state.lock();
        match connected {
            Ok(connection) => {
                state.serial += 1;
                state.connection = Some(connection);
                Ok(())
            }
            Err(why) => {
                state.why = format!("{}: {why}", self.address);
                Err(Unavailable(state.why.clone()))
            }
        }
    }

    /// Does the units, all at once, in one round trip per server; each unit's replies in the units' order.
    pub(super) async fn ask(&self, units: Vec<Unit>) -> Result<Vec<Vec<Value>>, Unavailable> {
        let (serial, connection) = {
            let state = self.state.lock();
            match &state.connection {
                Some(connection) => (state.serial, connection.clone()),
                None => return Err(Unavailable(state.why.clone())),
            }
        };
        let asking = match connection {
            Connection::Single(connection) => single(connection, units).boxed(),
            Connection::Cluster(connection) => cluster(connection, units).boxed(),
        };
        match tokio::time::timeout(self.timeout, asking).await {
            Ok(Ok(replies)) => Ok(replies),
            Ok(Err(error)) => Err(self.fail(serial, &line(&error))),
            Err(_) => Err(self.fail(serial, &format!("no answer within {:?}", self.timeout))),
        }
    }

    fn fail(&self, serial: u64, why: &str) -> Unavailable {
        let why = format!("{}: {why}", self.address);
        let mut state = self.state.lock();
        if state.serial == serial {
            state.connection = None;
            state.why.clone_from(&why);
        }
        Unavailable(why)
    }
}

/// One pipeline.
async fn single(mut connection: MultiplexedConnection, units: Vec<Unit>) -> RedisResult<Vec<Vec<Value>>> {
    let lengths: Vec<usize> = units.iter().map(Vec::len).collect();
    let mut replies = pipeline(units.into_iter().flatten()).query(&mut connection).await?.into_iter();
    Ok(lengths.into_iter().map(|len| replies.by_ref().take(len).collect()).collect())
}

/// One small pipeline per unit, all at the same time: the client sends each to the node of its slot, and what goes
/// to one node shares a connection.
async fn cluster(connection: ClusterConnection, units: Vec<Unit>) -> RedisResult<Vec<Vec<Value>>> {
    try_join_all(units.into_iter().map(|unit| {
        let mut connection = connection.clone();
        async move { pipeline(unit).query(&mut connection).await }
    }))
    .await
}

struct Commands(Pipeline);

fn pipeline(commands: impl IntoIterator<Item = Cmd>) -> Commands {
    let mut pipeline = Pipeline::new();
    for command in commands {
        pipeline.add_command(command);
    }
    Commands(pipeline)
}

impl Commands {
    async fn query(&self, connection: &mut impl redis::aio::ConnectionLike) -> RedisResult<Vec<Value>> {
        // The client takes a pipeline without commands for a mistake.
        if self.0.is_empty() { Ok(Vec::new()) } else { self.0.query_async(connection).await }
    }
}

fn info(url: &str, options: &Options) -> RedisResult<ConnectionInfo> {
    let info = url.into_connection_info()?;
    let mut login = info.redis_settings().clone();
    if !options.username.is_empty() {
        login = login.set_username(&options.username);
    }
    if !options.password.is_empty() {
        login = login.set_password(&options.password);
    }
    // Nagle's delay would sit between the packets of a pipeline.
    Ok(info.set_redis_settings(login).set_tcp_settings(TcpSettings::default().set_nodelay(true)))
}

async fn certificates(options: &Options) -> Result<Option<TlsCertificates>, Error> {
    let Some(path) = &options.ca_file else { return Ok(None) };
    let wrong = |why: String| Error::Option {
        field: "index.ca_file",
        reason: format!("{}: {why}; name a PEM file with the authority's certificate", path.display()),
    };
    let pem = tokio::fs::read(path).await.map_err(|error| wrong(error.to_string()))?;
    // The client would take a file without certificates and then trust nobody.
    if !String::from_utf8_lossy(&pem).contains("-----BEGIN CERTIFICATE-----") {
        return Err(wrong("it holds no certificate".into()));
    }
    Ok(Some(TlsCertificates { client_tls: None, root_cert: Some(pem) }))
}

/// An error in one short line: of a pipeline's errors, which tend to be alike, the first.
fn line(error: &RedisError) -> String {
    let first = error.clone().into_server_errors().and_then(|errors| Some(errors.first()?.1.to_string()));
    let text = first.unwrap_or_else(|| error.to_string());
    let line: String = text.lines().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(ERROR_LEN) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line,
    }
}
