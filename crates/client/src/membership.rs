//! Rounds of asking every store that was ever heard of whether it is there, and whom it knows.
//!
//! Seeds are looked up again in every round, and stores name others by their index. Both may fail at any time:
//! what was known stays known for a while. A store is live because it answers itself, never because it is named.

use crate::fleet::{Inner, normal};
use crate::node::dial;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_rpc::v1::{MembersRequest, MembersResponse};
use cacheclip_service::resolve;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Request};

/// Pause between rounds while no store is live.
const EAGER: Duration = Duration::from_millis(250);
/// Pause before a round that a failed call asked for, so that a store which fails every call is not asked all the
/// time.
const SOON: Duration = Duration::from_millis(50);
/// How long an endpoint is asked that nobody names and where nobody answers.
const FORGET: Duration = Duration::from_secs(600);
/// Most endpoints that are asked: a bound on what an index gone wild can cost.
const MOST: usize = 1024;

/// Asks in rounds until the last handle is gone.
pub(crate) async fn run(fleet: Weak<Inner>) {
    let mut rounds = Rounds::default();
    loop {
        let Some(inner) = fleet.upgrade() else { return };
        rounds.round(&inner).await;
        inner.round_ended();
        let pause = if inner.any_live() { inner.refresh } else { inner.refresh.min(EAGER) };
        let wake = Arc::clone(&inner.wake);
        drop(inner);
        tokio::select! {
            () = sleep(pause) => {}
            () = wake.notified() => sleep(SOON).await,
        }
    }
}

#[derive(Debug, Default)]
struct Rounds {
    known: HashMap<String, Known>,
    /// What each seed stood for when it was last looked up.
    addresses: HashMap<String, Vec<String>>,
}

#[derive(Debug)]
struct Known {
    client: CacheClient<Channel>,
    /// When somebody last answered there, or when it was first heard of.
    heard: Instant,
}

enum Step {
    LookedUp { seed: String, found: Result<Vec<String>, cacheclip_service::Error> },
    Asked { endpoint: String, answer: Result<MembersResponse, Unanswered> },
}

/// Why an endpoint did not say who is there.
enum Unanswered {
    /// It is there, and has too much to do to say more.
    Busy,
    /// It refused, or nobody listens there.
    Refused(String),
    Silent,
}

/// One round: what is still under way, and what has been asked or named.
struct Round {
    steps: FuturesUnordered<BoxFuture<'static, Step>>,
    asked: HashSet<String>,
    named: HashSet<String>,
}

impl Rounds {
    async fn round(&mut self, fleet: &Inner) {
        let mut round =
            Round { steps: FuturesUnordered::new(), asked: HashSet::new(), named: HashSet::new() };
        for seed in fleet.seeds.clone() {
            round.steps.push(
                async move {
                    let found = resolve::expand(&seed).await;
                    Step::LookedUp { seed, found }
                }
                .boxed(),
            );
        }
        let known: Vec<String> = self.known.keys().cloned().collect();
        known.into_iter().for_each(|endpoint| self.ask(fleet, &mut round, endpoint));
        while let Some(step) = round.steps.next().await {
            match step {
                Step::LookedUp { seed, found } => {
                    match found {
                        Ok(found) => {
                            self.addresses.insert(seed.clone(), found.iter().map(|it| normal(it)).collect());
                        }
                        // A name server that does not answer takes nobody away.
                        Err(error) => tracing::debug!(seed, %error, "stores cannot be looked up"),
                    }
                    if seed.starts_with("dns+") {
                        fleet.looked_up(&seed, self.addresses.contains_key(&seed));
                    }
                    for endpoint in self.addresses.get(&seed).cloned().unwrap_or_default() {
                        self.name(fleet, &mut round, endpoint);
                    }
                }
                Step::Asked { endpoint, answer: Ok(answer) } => {
                    self.take(fleet, &mut round, &endpoint, answer)
                }
                Step::Asked { answer: Err(Unanswered::Busy), .. } => {}
                Step::Asked { endpoint, answer: Err(Unanswered::Refused(why)) } => {
                    fleet.refused(&endpoint, &why)
                }
                Step::Asked { endpoint, answer: Err(Unanswered::Silent) } => fleet.silent(&endpoint),
            }
        }
        self.known.retain(|endpoint, known| round.named.contains(endpoint) || known.heard.elapsed() < FORGET);
        fleet.retain(|endpoint| self.known.contains_key(endpoint));
    }

    /// Somebody says that there may be a store.
    fn name(&mut self, fleet: &Inner, round: &mut Round, endpoint: String) {
        if round.named.len() < MOST && round.named.insert(endpoint.clone()) {
            self.ask(fleet, round, endpoint);
        }
    }

    fn ask(&mut self, fleet: &Inner, round: &mut Round, endpoint: String) {
        if !round.asked.insert(endpoint.clone()) {
            return;
        }
        fleet.asks(&endpoint);
        let client = match self.known.get(&endpoint) {
            Some(known) => known.client.clone(),
            None => match dial(&endpoint, &fleet.connect) {
                Ok(client) => {
                    let known = Known { client: client.clone(), heard: Instant::now() };
                    self.known.insert(endpoint.clone(), known);
                    client
                }
                Err(error) => {
                    return tracing::warn!(endpoint, %error, "a store names one that cannot be dialled");
                }
            },
        };
        let times = if fleet.is_live_at(&endpoint) { 2 } else { 1 };
        round.steps.push(members(endpoint, client, times, fleet.patience).boxed());
    }

    fn take(&mut self, fleet: &Inner, round: &mut Round, endpoint: &str, answer: MembersResponse) {
        let node = answer.node.unwrap_or_default();
        if node.name.is_empty() {
            return fleet.refused(endpoint, "it does not say its name");
        }
        if let Some(known) = self.known.get_mut(endpoint) {
            known.heard = Instant::now();
            fleet.answered(endpoint, &node, &known.client);
            fleet.counts(&node.name, answer.generation);
        }
        if !answer.index_unavailable.is_empty() {
            tracing::debug!(
                store = node.name,
                why = answer.index_unavailable,
                "a store cannot ask its index"
            );
        }
        let endpoints = std::iter::once(&node).chain(&answer.peers).map(|peer| peer.endpoint.as_str());
        for endpoint in endpoints.filter(|endpoint| !endpoint.is_empty()) {
            self.name(fleet, round, normal(endpoint));
        }
    }
}

async fn members(endpoint: String, client: CacheClient<Channel>, times: u32, patience: Duration) -> Step {
    let mut answer = Err(Unanswered::Silent);
    for _ in 0..times {
        let mut client = client.clone();
        match timeout(patience, client.members(Request::new(MembersRequest {}))).await {
            Ok(Ok(said)) => answer = Ok(said.into_inner()),
            Ok(Err(status)) if status.code() == Code::ResourceExhausted => answer = Err(Unanswered::Busy),
            Ok(Err(status)) => answer = Err(Unanswered::Refused(status.message().to_owned())),
            Err(_) => continue,
        }
        break;
    }
    Step::Asked { endpoint, answer }
}
