//! The index in Redis, shared by the stores of a fleet. No KV is kept there, and nothing that cannot be announced
//! again.
//!
//! ```text
//! <namespace>:v1:chunk:<key>   hash: node → life (8, little-endian) and packed entry; expires
//! <namespace>:v1:node:<name>   "<life> <endpoint>": a node's lease; expires
//! <namespace>:v1:nodes         set of names that had a lease
//! <namespace>:v1:epoch…        random value: see `epoch`
//! ```
//!
//! A *life* is a random number that a store draws when it starts. Records of another life than the lease's count
//! for nothing: a store that comes back without its disk, or that was killed between removing a chunk and saying
//! so, is not believed to have what it had. The only thing that must change as a whole is one chunk's record, so
//! nothing here needs keys to be in one slot.

use super::link::{Link, Unit};
use super::{
    Again, Answer, Entry, Holder, Index, Options, PACKED, Peer, Renewal, Unavailable, epoch, random,
};
use crate::error::Error;
use cacheclip_chunk::ChunkKey;
use cacheclip_service::seconds;
use futures::FutureExt as _;
use parking_lot::Mutex;
use redis::{Value, cmd};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// Records that no holder has announced for this long are gone.
const RECORD_LIFE: Duration = Duration::from_secs(4 * 3600);
/// Everything is announced again this often, which also brings back what a failover may have lost.
const REFRESH: Duration = Duration::from_secs(3600);

/// The index in Redis as one node sees it.
#[derive(Debug)]
pub struct Redis {
    link: Link,
    node: String,
    prefix: String,
    lease: Duration,
    markers: Vec<String>,
    mine: Mutex<Mine>,
    /// Leases of other nodes, as of the last renewal.
    others: Mutex<HashMap<String, Lease>>,
}

#[derive(Debug)]
struct Mine {
    life: u64,
    /// The lease has been renewed in this life.
    renewed: bool,
    /// The markers' values under which everything was announced, and when.
    announced: Option<(Vec<Option<Vec<u8>>>, Instant)>,
}

#[derive(Debug)]
struct Lease {
    life: u64,
    until: Instant,
}

impl Redis {
    /// Connects to nothing yet; [`Index::renew`] does.
    ///
    /// # Errors
    /// Options that cannot work, by the name of the field.
    pub async fn open(node: &str, options: &Options) -> Result<Self, Error> {
        options.check()?;
        if node.is_empty() || node.len() > 255 || node.contains(|c: char| c.is_whitespace() || c.is_control())
        {
            let reason = format!("is {node:?}, must be 1 to 255 characters without spaces");
            return Err(Error::Option { field: "node", reason });
        }
        let prefix = format!("{}:v1:", options.namespace);
        Ok(Self {
            link: Link::open(options).await?,
            node: node.into(),
            markers: epoch::markers(&prefix, options.cluster),
            prefix,
            lease: seconds(options.lease_seconds),
            mine: Mutex::new(Mine { life: random(), renewed: false, announced: None }),
            others: Mutex::default(),
        })
    }

    fn chunk(&self, key: &ChunkKey) -> String {
        format!("{}chunk:{key}", self.prefix)
    }

    fn lease(&self, name: &str) -> String {
        format!("{}node:{name}", self.prefix)
    }

    fn nodes(&self) -> String {
        format!("{}nodes", self.prefix)
    }

    /// Renews this node's lease; the names that have or had one, and the markers' values.
    async fn sign(&self, endpoint: &str) -> Result<Signed, Unavailable> {
        let (life, renewed) = {
            let mine = self.mine.lock();
            (mine.life, mine.renewed)
        };
        let (lease, nodes) = (self.lease(&self.node), self.nodes());
        let value = format!("{life:016x} {endpoint}");
        let millis = self.lease.as_millis().max(1) as u64;
        let mut units = vec![
            vec![get(&lease), cmd("SET").arg(&lease).arg(value).arg("PX").arg(millis).take()],
            vec![cmd("SADD").arg(&nodes).arg(&self.node).take(), cmd("SMEMBERS").arg(&nodes).take()],
        ];
        let fresh = format!("{:016x}", random());
        units.extend(
            self.markers
                .iter()
                .map(|marker| vec![cmd("SET").arg(marker).arg(&fresh).arg("NX").take(), get(marker)]),
        );
        let mut replies = self.link.ask(units).await?.into_iter().map(Vec::into_iter);
        let before = replies.next().and_then(|mut unit| unit.next()).and_then(text);
        let names = replies.next().and_then(|mut unit| unit.nth(1)).map_or_else(Vec::new, items);
        let epoch = replies.map(|mut unit| unit.nth(1).and_then(bytes)).collect();
        // The lease of an earlier life may be our own, from before a crash.
        let twin = before.as_deref().and_then(parse_lease).filter(|(other, _)| renewed && *other != life);
        let mut mine = self.mine.lock();
        if mine.life == life {
            mine.renewed = true;
        }
        Ok(Signed {
            names: names.into_iter().filter_map(text).filter(|name| *name != self.node).collect(),
            epoch,
            twin: twin.map(|(_, endpoint)| endpoint.to_owned()),
        })
    }

    /// The leases of these nodes; names without one are forgotten.
    async fn leases(&self, names: Vec<String>) -> Result<Vec<Peer>, Unavailable> {
        let ask = |name: &String| {
            let lease = self.lease(name);
            vec![get(&lease), cmd("PTTL").arg(&lease).take()]
        };
        let replies = self.link.ask(names.iter().map(ask).collect()).await?;
        let (mut peers, mut others, mut gone) = (Vec::new(), HashMap::new(), Vec::new());
        for (name, reply) in names.into_iter().zip(replies) {
            let mut reply = reply.into_iter();
            let value = reply.next().and_then(text);
            let millis = reply.next().and_then(number).and_then(|millis| u64::try_from(millis).ok());
            match (value.as_deref().and_then(parse_lease), millis) {
                (Some((life, endpoint)), Some(millis)) => {
                    let lease = Duration::from_millis(millis);
                    others.insert(name.clone(), Lease { life, until: Instant::now() + lease });
                    peers.push(Peer { name, endpoint: endpoint.to_owned(), lease });
                }
                _ => gone.push(name),
            }
        }
        *self.others.lock() = others;
        if !gone.is_empty() {
            // Should one of them be renewing just now, its next renewal adds it again.
            self.link.ask(vec![vec![cmd("SREM").arg(self.nodes()).arg(gone).take()]]).await?;
        }
        peers.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(peers)
    }

    fn again(&self, epoch: Vec<Option<Vec<u8>>>) -> Again {
        let mut mine = self.mine.lock();
        let again = match &mine.announced {
            None => Again::New,
            Some((known, _)) if *known != epoch => Again::Lost,
            Some((_, at)) if at.elapsed() >= REFRESH => Again::Refresh,
            Some(_) => return Again::No,
        };
        mine.announced = Some((epoch, Instant::now()));
        again
    }

    /// The holders that a chunk's record names, without those that have no lease or had another life.
    fn holders(&self, record: Value) -> Vec<Holder> {
        let life = self.mine.lock().life;
        let (others, now) = (self.others.lock(), Instant::now());
        let mut fields = items(record).into_iter();
        let mut holders = Vec::new();
        while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
            let (Some(node), Some((of, entry))) = (text(name), bytes(value).and_then(|it| unpack(&it)))
            else {
                continue;
            };
            let valid = if node == self.node {
                of == life
            } else {
                others.get(&node).is_some_and(|lease| lease.life == of && lease.until > now)
            };
            if valid {
                holders.push(Holder { node, entry });
            }
        }
        holders.sort_by(|a, b| a.node.cmp(&b.node));
        holders
    }
}

struct Signed {
    names: Vec<String>,
    epoch: Vec<Option<Vec<u8>>>,
    twin: Option<String>,
}

impl Index for Redis {
    fn locate<'a>(&'a self, keys: &'a [ChunkKey]) -> Answer<'a, Vec<Vec<Holder>>> {
        let units = keys.iter().map(|key| vec![cmd("HGETALL").arg(self.chunk(key)).take()]).collect();
        async move {
            let replies = self.link.ask(units).await?;
            Ok(replies.into_iter().flatten().map(|record| self.holders(record)).collect())
        }
        .boxed()
    }

    fn publish<'a>(&'a self, entries: &'a [(ChunkKey, Entry)]) -> Answer<'a, ()> {
        let life = self.mine.lock().life;
        let unit = |(key, entry): &(ChunkKey, Entry)| {
            let chunk = self.chunk(key);
            let millis = RECORD_LIFE.as_millis() as u64;
            vec![
                cmd("HSET").arg(&chunk).arg(&self.node).arg(&pack(life, entry)[..]).take(),
                cmd("PEXPIRE").arg(&chunk).arg(millis).take(),
            ]
        };
        let units: Vec<Unit> = entries.iter().map(unit).collect();
        async move { self.link.ask(units).await.map(drop) }.boxed()
    }

    fn withdraw<'a>(&'a self, keys: &'a [ChunkKey]) -> Answer<'a, ()> {
        let unit = |key: &ChunkKey| vec![cmd("HDEL").arg(self.chunk(key)).arg(&self.node).take()];
        let units: Vec<Unit> = keys.iter().map(unit).collect();
        async move { self.link.ask(units).await.map(drop) }.boxed()
    }

    fn clear(&self) -> Answer<'_, ()> {
        // A new life: the records of the old one are worth nothing from the next renewal on.
        let mut mine = self.mine.lock();
        (mine.life, mine.renewed) = (random(), false);
        drop(mine);
        async { Ok(()) }.boxed()
    }

    fn renew<'a>(&'a self, endpoint: &'a str) -> Answer<'a, Renewal> {
        async move {
            self.link.connect().await?;
            let Signed { names, epoch, twin } = self.sign(endpoint).await?;
            let peers = self.leases(names).await?;
            Ok(Renewal { peers, again: self.again(epoch), twin })
        }
        .boxed()
    }

    fn leave(&self) -> Answer<'_, ()> {
        let units = vec![
            vec![cmd("DEL").arg(self.lease(&self.node)).take()],
            vec![cmd("SREM").arg(self.nodes()).arg(&self.node).take()],
        ];
        async move { self.link.ask(units).await.map(drop) }.boxed()
    }
}

fn get(key: &str) -> redis::Cmd {
    cmd("GET").arg(key).take()
}

fn pack(life: u64, entry: &Entry) -> [u8; 8 + PACKED] {
    let mut packed = [0; 8 + PACKED];
    packed[..8].copy_from_slice(&life.to_le_bytes());
    packed[8..].copy_from_slice(&entry.pack());
    packed
}

/// None for what this release did not write.
pub(super) fn unpack(packed: &[u8]) -> Option<(u64, Entry)> {
    let (life, entry) = packed.split_first_chunk()?;
    Some((u64::from_le_bytes(*life), Entry::unpack(entry.try_into().ok()?)))
}

/// Life and endpoint.
pub(super) fn parse_lease(value: &str) -> Option<(u64, &str)> {
    let (life, endpoint) = value.split_once(' ')?;
    Some((u64::from_str_radix(life, 16).ok()?, endpoint))
}

fn items(value: Value) -> Vec<Value> {
    match value {
        Value::Array(items) | Value::Set(items) => items,
        _ => Vec::new(),
    }
}

fn bytes(value: Value) -> Option<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.into_bytes()),
        _ => None,
    }
}

fn text(value: Value) -> Option<String> {
    String::from_utf8(bytes(value)?).ok()
}

fn number(value: Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_chunk::{ContainerHash, LayoutId};

    #[test]
    fn a_record_keeps_life_and_entry_and_nothing_else_is_taken_for_one() {
        let entry = Entry {
            layout: LayoutId::from_bytes([1; 32]),
            container: ContainerHash::from_bytes([2; 32]),
            bytes: 3 << 40,
        };
        let packed = pack(7, &entry);
        assert_eq!(unpack(&packed), Some((7, entry)));
        assert_eq!(unpack(&packed[1..]), None);
        assert_eq!(unpack(&[&packed[..], &[0]].concat()), None);
        assert_eq!(unpack(b""), None);
    }

    #[test]
    fn a_lease_names_life_and_endpoint() {
        assert_eq!(parse_lease("00000000000000ff http://a:1"), Some((255, "http://a:1")));
        assert_eq!(parse_lease("http://a:1"), None);
        assert_eq!(parse_lease("zz http://a:1"), None);
    }
}
