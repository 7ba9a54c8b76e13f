//! Endpoints that stand for several peers: `dns+http://name:port` is every address the name has now.
//!
//! Kubernetes gives a headless service one address per pod, and no client library's balancing may hide them: who
//! holds which chunk is known per peer.

use crate::Error;
use std::collections::BTreeSet;
use std::time::Duration;

/// Longest wait for a name server.
const PATIENCE: Duration = Duration::from_secs(3);
const MANY: &str = "dns+";

/// The endpoints that `endpoint` stands for: itself, or one per address of its name, sorted.
///
/// # Errors
/// A name without a port, or one that cannot be looked up in time.
pub async fn expand(endpoint: &str) -> Result<Vec<String>, Error> {
    let Some(named) = endpoint.strip_prefix(MANY) else { return Ok(vec![endpoint.to_owned()]) };
    let wrong = |reason: String| Error::Endpoint { endpoint: endpoint.into(), reason };
    let authority = named
        .strip_prefix("http://")
        .ok_or_else(|| wrong("dns+ must be followed by http://".into()))?
        .trim_end_matches('/');
    let looked_up = tokio::time::timeout(PATIENCE, tokio::net::lookup_host(authority)).await;
    let addresses = looked_up
        .map_err(|_| wrong(format!("its name was not looked up within {PATIENCE:?}")))?
        .map_err(|error| wrong(error.to_string()))?;
    // A set: resolvers may name one address several times, in any order.
    Ok(addresses.map(|address| format!("http://{address}")).collect::<BTreeSet<_>>().into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_plain_endpoint_stands_for_itself_and_a_name_for_its_addresses() {
        assert_eq!(expand("http://10.0.0.1:7073").await.expect("itself"), ["http://10.0.0.1:7073"]);
        let loopback = expand("dns+http://localhost:7073").await.expect("addresses");
        assert!(loopback.contains(&"http://127.0.0.1:7073".to_owned()), "{loopback:?}");
    }

    #[tokio::test]
    async fn a_name_that_cannot_be_looked_up_is_an_error_that_names_it() {
        for bad in ["dns+http://no-port", "dns+localhost:1", "dns+http://does-not-exist.invalid:1"] {
            let error = expand(bad).await.expect_err(bad).to_string();
            assert!(error.contains(bad), "{error}");
        }
    }
}
