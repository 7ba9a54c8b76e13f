//! Deletion: a document goes from stores, workers and scorers, and the caller hears what went and who has not answered.
//!
//! Every worker and every scorer is asked, for each has a cache of its own. All of them ask the same stores, which give
//! every one of them the same answer: stores count once.

use crate::metrics;
use crate::request::{check_document, check_model, check_name};
use crate::scorer::Scorers;
use crate::sections::Sections;
use crate::worker::{Workers, passed_on, within};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::deletion;
use cacheclip_rpc::status::invalid;
use cacheclip_rpc::v1::{self, HolderDeletion, Tier};
use cacheclip_service::request_id::outgoing;
use futures::future::{BoxFuture, join_all};
use std::collections::BTreeSet;
use std::time::Duration;
use tonic::{Request, Response, Status};

/// Longest wait for one worker or scorer, which itself waits for the stores.
const PATIENCE: Duration = Duration::from_secs(60);

/// A worker or scorer by its name in receipts, and its answer.
type Asked<'a> = BoxFuture<'a, (String, Result<HolderDeletion, Status>)>;

/// Deletes documents. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Deletion {
    pub(crate) workers: Workers,
    pub(crate) scorers: Scorers,
    pub(crate) sections: Sections,
}

impl Deletion {
    /// Deletes a tenant's document.
    ///
    /// # Errors
    /// Only a request that names none: whoever does not answer is in the receipt.
    pub(crate) async fn run(
        &self,
        tenant: &str,
        request: v1::DeleteIngestedRequest,
    ) -> Result<v1::DeletionReceipt, Status> {
        let v1::DeleteIngestedRequest { model, document, salt } = request;
        if !model.is_empty() {
            check_model("model", &model, &*self.workers.described()?)?;
        }
        if document.is_empty() {
            return Err(invalid("document", "must not be empty: it is the name that was given at ingest"));
        }
        check_document("document", &document)?;
        check_name("salt", &salt)?;
        let id = self.sections.document(tenant, &salt, &document);
        let (asked, unknown) =
            self.ask(&v1::DeleteDocumentRequest { document: id_bytes(id.as_bytes()), ..Default::default() });
        let mut pending: BTreeSet<String> = unknown.into_iter().collect();
        let mut answers = Vec::new();
        for (holder, answer) in join_all(asked).await {
            match answer {
                Ok(answer) => answers.push(answer),
                Err(status) => {
                    tracing::warn!(holder, %status, "a document is not deleted here yet");
                    pending.insert(holder);
                }
            }
        }
        let receipt = put_together(document, answers, pending);
        metrics::deleted(receipt.pending.is_empty());
        tracing::info!(document = %id, generation = receipt.generation, pending = ?receipt.pending, "a document was deleted");
        Ok(receipt)
    }

    /// Asks all workers and scorers; the names behind which none was found.
    fn ask(&self, request: &v1::DeleteDocumentRequest) -> (Vec<Asked<'static>>, Vec<String>) {
        let (workers, mut unknown) = self.workers.all();
        let (scorers, names) = self.scorers.all();
        unknown.extend(names);
        let mut asked: Vec<Asked<'static>> = Vec::with_capacity(workers.len() + scorers.len());
        for worker in workers {
            let (mut client, request) =
                (self.workers.client(&worker), outgoing(Request::new(request.clone())));
            let call = async move { client.delete_document(request).await };
            asked.push(ask_one("worker", worker.endpoint(), call));
        }
        for scorer in scorers {
            let (mut client, request) =
                (self.scorers.client(&scorer), outgoing(Request::new(request.clone())));
            let call = async move { client.delete_document(request).await };
            asked.push(ask_one("scorer", scorer.endpoint(), call));
        }
        (asked, unknown)
    }
}

fn ask_one(
    kind: &'static str,
    endpoint: &str,
    call: impl Future<Output = Result<Response<HolderDeletion>, Status>> + Send + 'static,
) -> Asked<'static> {
    let name = format!("{kind} {endpoint}");
    Box::pin(async move {
        let answer = within(PATIENCE, &format!("the {kind}'s deletion"), call).await;
        (name, answer.map(Response::into_inner).map_err(|it| passed_on(&it, kind)))
    })
}

/// The receipt: what holders gave up of their own adds up, what stores told each of them is the same.
fn put_together(
    document: String,
    answers: Vec<HolderDeletion>,
    mut pending: BTreeSet<String>,
) -> v1::DeletionReceipt {
    let mut receipt = v1::DeletionReceipt { document, ..Default::default() };
    for answer in answers {
        receipt.generation = receipt.generation.max(answer.generation);
        receipt.kept = receipt.kept.max(answer.kept);
        pending.extend(answer.pending.into_iter().map(|store| format!("store {store}")));
        for tier in &answer.tiers {
            match tier.tier() {
                Tier::WorkerRam | Tier::ScorerRam => deletion::add(&mut receipt.tiers, tier),
                _ => deletion::at_least(&mut receipt.tiers, tier),
            }
        }
    }
    receipt.pending = pending.into_iter().collect();
    receipt
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_rpc::v1::TierDeletion;

    #[test]
    fn stores_that_several_asked_count_once_and_the_holders_own_ram_adds_up() {
        let disk = TierDeletion::of(Tier::StoreDisk, 4, 400);
        let answer = |own: TierDeletion, kept, pending: &[&str]| HolderDeletion {
            generation: 3,
            tiers: vec![own, disk],
            kept,
            pending: pending.iter().map(|it| (*it).to_owned()).collect(),
        };
        let answers = vec![
            answer(TierDeletion::of(Tier::WorkerRam, 2, 20), 1, &[]),
            answer(TierDeletion::of(Tier::WorkerRam, 1, 10), 1, &["store-1"]),
            answer(TierDeletion::of(Tier::ScorerRam, 2, 6), 1, &["store-1"]),
        ];
        let receipt = put_together("handbook".into(), answers, ["worker http://w".to_owned()].into());
        assert_eq!((receipt.generation, receipt.kept), (3, 1));
        assert_eq!(
            receipt.tiers,
            [TierDeletion::of(Tier::WorkerRam, 3, 30), disk, TierDeletion::of(Tier::ScorerRam, 2, 6)]
        );
        assert_eq!(receipt.pending, ["store store-1", "worker http://w"]);
    }
}
