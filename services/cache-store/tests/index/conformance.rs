//! What every index promises, run on each implementation, and what those that are shared promise beyond it.

use crate::servers::{Flavour, Server, cluster, installed};
use cacheclip_cache_store::index::{Again, Embedded, Entry, Holder, Index, Kind, Options, Redis};
use cacheclip_chunk::{ChunkKey, ContainerHash, LayoutId};

fn key(n: u16) -> ChunkKey {
    let mut bytes = [7; 32];
    bytes[..2].copy_from_slice(&n.to_le_bytes());
    ChunkKey::from_bytes(bytes)
}

fn entry(n: u8) -> Entry {
    let id = [n; 32];
    Entry {
        layout: LayoutId::from_bytes(id),
        container: ContainerHash::from_bytes(id),
        bytes: u64::from(n) << 40,
    }
}

fn holder(node: &str, n: u8) -> Holder {
    Holder { node: node.into(), entry: entry(n) }
}

/// `index` is that of node `a`.
async fn conforms(index: &dyn Index) {
    index.renew("http://a:1").await.unwrap();
    let keys: Vec<_> = (1..=4).map(key).collect();
    assert_eq!(index.locate(&keys).await.unwrap(), vec![Vec::new(); 4]);
    index.publish(&[(key(1), entry(1)), (key(2), entry(2)), (key(3), entry(3))]).await.unwrap();
    index.withdraw(&[key(2), key(4)]).await.unwrap();
    let found = index.locate(&keys).await.unwrap();
    assert_eq!(found, [vec![holder("a", 1)], vec![], vec![holder("a", 3)], vec![]]);
    index.publish(&[(key(3), entry(9))]).await.unwrap();
    let found = index.locate(&[key(3), key(1)]).await.unwrap();
    assert_eq!(found, [[holder("a", 9)], [holder("a", 1)]]);

    index.publish(&[]).await.unwrap();
    index.withdraw(&[]).await.unwrap();
    assert_eq!(index.locate(&[]).await.unwrap(), Vec::<Vec<Holder>>::new());

    let many: Vec<_> = (100..1100).map(|n| (key(n), entry(n as u8))).collect();
    index.publish(&many).await.unwrap();
    let keys: Vec<_> = (90..1110).rev().map(key).collect();
    for (n, holders) in (90..1110).rev().zip(index.locate(&keys).await.unwrap()) {
        let there = (100..1100).contains(&n);
        assert_eq!(holders, if there { vec![holder("a", n as u8)] } else { vec![] }, "chunk {n}");
    }

    index.clear().await.unwrap();
    assert_eq!(index.locate(&keys).await.unwrap(), vec![Vec::new(); keys.len()]);
    index.publish(&[(key(1), entry(1))]).await.unwrap();
    assert_eq!(index.locate(&[key(1)]).await.unwrap(), [[holder("a", 1)]]);
    index.leave().await.unwrap();
}

/// What a shared index promises to several nodes.
async fn conforms_for_a_fleet(options: &Options, servers: &[Server]) {
    let open = async |node: &str| Redis::open(node, options).await.unwrap();
    let (a, b) = (open("a").await, open("b").await);
    assert_eq!(a.locate(&[key(1)]).await.unwrap_err().0, "not connected yet", "only a renewal connects");
    let renewal = a.renew("http://a:1").await.unwrap();
    assert_eq!((renewal.again, renewal.peers.len(), renewal.twin), (Again::New, 0, None));
    let renewal = b.renew("http://b:1").await.unwrap();
    assert_eq!((renewal.peers[0].name.as_str(), renewal.peers[0].endpoint.as_str()), ("a", "http://a:1"));
    assert!(renewal.peers[0].lease.as_secs_f64() <= options.lease_seconds);
    let renewal = a.renew("http://a:1").await.unwrap();
    assert_eq!((renewal.again, renewal.peers[0].name.as_str()), (Again::No, "b"));

    // Records are per node, and so are withdrawals.
    a.publish(&[(key(1), entry(1)), (key(2), entry(2))]).await.unwrap();
    b.publish(&[(key(1), entry(5))]).await.unwrap();
    for index in [&a, &b] {
        let found = index.locate(&[key(1), key(2)]).await.unwrap();
        assert_eq!(found, [vec![holder("a", 1), holder("b", 5)], vec![holder("a", 2)]]);
    }
    a.withdraw(&[key(1)]).await.unwrap();
    assert_eq!(b.locate(&[key(1)]).await.unwrap(), [[holder("b", 5)]]);

    // A node in its next life is not believed to have what it had in the last.
    let reborn = open("a").await;
    assert_eq!(reborn.renew("http://a:2").await.unwrap().again, Again::New);
    assert_eq!(b.locate(&[key(2)]).await.unwrap(), [[holder("a", 2)]], "b has not heard yet");
    assert_eq!(b.renew("http://b:1").await.unwrap().peers[0].endpoint, "http://a:2");
    assert_eq!(b.locate(&[key(2)]).await.unwrap(), [[]]);
    reborn.publish(&[(key(2), entry(3))]).await.unwrap();
    assert_eq!(b.locate(&[key(2)]).await.unwrap(), [[holder("a", 3)]]);

    // Two that use one name find out.
    assert_eq!(a.renew("http://a:1").await.unwrap().twin.as_deref(), Some("http://a:2"));
    assert_eq!(reborn.renew("http://a:2").await.unwrap().twin.as_deref(), Some("http://a:1"));
    assert_eq!(reborn.renew("http://a:2").await.unwrap().twin, None);

    // Each server can be lost on its own, and every node finds out.
    for server in servers {
        for index in [&reborn, &b] {
            assert_eq!(index.renew("http://x:1").await.unwrap().again, Again::No);
        }
        assert_eq!(server.cli(&["FLUSHALL"]), "OK");
        for index in [&b, &reborn] {
            assert_eq!(index.renew("http://x:1").await.unwrap().again, Again::Lost);
        }
    }

    reborn.leave().await.unwrap();
    assert_eq!(b.renew("http://b:1").await.unwrap().peers, []);
    b.leave().await.unwrap();
}

fn options(servers: &[Server]) -> Options {
    Options {
        kind: Kind::Redis,
        urls: servers.iter().map(Server::url).collect(),
        // A busy machine is no reason to fail.
        timeout_seconds: 20.0,
        lease_seconds: 60.0,
        ..Options::default()
    }
}

async fn conforms_twice(options: &Options, servers: &[Server]) {
    let other = Options { namespace: "other.fleet".into(), ..options.clone() };
    conforms(&Redis::open("a", &other).await.unwrap()).await;
    // Nothing of the first is seen by the second.
    conforms_for_a_fleet(options, servers).await;
}

#[tokio::test]
async fn the_embedded_index_conforms() {
    let dir = tempfile::tempdir().unwrap();
    conforms(&Embedded::open(dir.path().join("index.redb"), "a", vec![], None).await.unwrap()).await;
}

#[tokio::test]
async fn an_opened_index_says_what_the_catalogue_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index.redb");
    let keys: Vec<_> = (1..=3).map(key).collect();
    let open = async |catalogue| Embedded::open(path.clone(), "a", catalogue, None).await.unwrap();
    let index = open(vec![(key(1), entry(1)), (key(2), entry(2))]).await;
    drop(index);
    let index = open(vec![(key(2), entry(5)), (key(3), entry(3))]).await;
    let found = index.locate(&keys).await.unwrap();
    assert_eq!(found, [vec![], vec![holder("a", 5)], vec![holder("a", 3)]]);
    drop(index);
    let whole = std::fs::read(&path).unwrap();
    for damage in [&whole[..100], &whole[..whole.len() / 2], b"", &[0xff; 8192]] {
        std::fs::write(&path, damage).unwrap();
        let index = open(vec![(key(1), entry(1))]).await;
        assert_eq!(index.locate(&keys).await.unwrap(), [vec![holder("a", 1)], vec![], vec![]]);
    }
}

#[tokio::test]
async fn redis_conforms_and_a_record_is_small() {
    if !installed() {
        return;
    }
    let servers = [Server::start(Flavour::default())];
    conforms_twice(&options(&servers), &servers).await;

    let index = Redis::open("store-0", &options(&servers)).await.unwrap();
    index.renew("http://store-0:7073").await.unwrap();
    let used = || {
        let memory = servers[0].cli(&["INFO", "memory"]);
        memory.lines().find_map(|it| it.strip_prefix("used_memory:")).unwrap().trim().parse::<u64>().unwrap()
    };
    let before = used();
    let many: Vec<_> = (0..20_000).map(|n| (key(n), entry(1))).collect();
    for some in many.chunks(1000) {
        index.publish(some).await.unwrap();
    }
    let each = (used() - before) / many.len() as u64;
    println!("{each} bytes of Redis per record");
    assert!(each < 500, "{each} bytes per record");
}

#[tokio::test]
async fn redis_with_a_password_conforms() {
    if !installed() {
        return;
    }
    let servers = [Server::start(Flavour { password: Some("let me in"), ..Flavour::default() })];
    let right = Options { password: "let me in".into(), ..options(&servers) };
    conforms_twice(&right, &servers).await;

    for password in ["", "hunter2"] {
        let wrong = Options { password: password.into(), ..options(&servers) };
        let refused = Redis::open("a", &wrong).await.unwrap().renew("http://a:1").await.unwrap_err().0;
        assert!(refused.contains(&servers[0].url()), "{refused}");
        assert!(!refused.contains("hunter2"), "{refused}");
    }
}

/// The commands that docs/operations.md lists.
const COMMANDS: &str = "+hset +hdel +hgetall +get +set +del +pttl +pexpire +sadd +srem +smembers +ping";

#[tokio::test]
async fn redis_conforms_for_a_user_who_may_do_no_more_than_needed() {
    if !installed() {
        return;
    }
    let servers = [Server::start(Flavour::default())];
    let mut rules = vec!["ACL", "SETUSER", "fleet", "on", ">let me in", "~cacheclip:*", "~other.fleet:*"];
    rules.extend(COMMANDS.split(' '));
    assert_eq!(servers[0].cli(&rules), "OK");
    let user = Options { username: "fleet".into(), password: "let me in".into(), ..options(&servers) };
    conforms_twice(&user, &servers).await;
    let foreign = Options { namespace: "foreign".into(), ..user };
    let refused = Redis::open("a", &foreign).await.unwrap().renew("http://a:1").await.unwrap_err();
    assert!(refused.0.contains("no permissions"), "{refused}");
}

#[tokio::test]
async fn redis_with_tls_conforms_and_a_stranger_is_not_trusted() {
    if !installed() {
        return;
    }
    let servers = [Server::start(Flavour { tls: true, ..Flavour::default() })];
    let trusting = Options { ca_file: Some(servers[0].ca_file()), ..options(&servers) };
    conforms_twice(&trusting, &servers).await;

    // Public authorities have not signed this server's certificate, and neither has another authority.
    let stranger = Server::at(1, Flavour { tls: true, ..Flavour::default() });
    for ca_file in [None, Some(stranger.ca_file())] {
        let index = Redis::open("a", &Options { ca_file, ..options(&servers) }).await.unwrap();
        let refused = index.renew("http://a:1").await.unwrap_err();
        assert!(refused.0.contains("certificate"), "{refused}");
    }
    for wrong in ["nowhere.crt", file!()] {
        let options = Options { ca_file: Some(wrong.into()), ..options(&servers) };
        let error = Redis::open("a", &options).await.unwrap_err().to_string();
        assert!(error.starts_with("index.ca_file: ") && error.contains("PEM"), "{error}");
    }
}

#[tokio::test]
async fn a_redis_cluster_conforms() {
    if !installed() {
        return;
    }
    let servers = cluster();
    let all = Options { cluster: true, ..options(&servers) };
    conforms_twice(&all, &servers).await;
    // One address is enough to find the others.
    let seed = Options { urls: vec![servers[2].url()], ..all };
    conforms(&Redis::open("a", &seed).await.unwrap()).await;
    // All shards hold records: without them, the suite would have proved less.
    for server in &servers {
        assert!(server.cli(&["--scan", "--pattern", "*:v1:chunk:*"]).lines().count() > 100);
    }
}
