//! Ingest: documents' chunks are computed ahead of need, in bounded batches, by worker and scorer side by side.

use crate::metrics;
use crate::peers::wanted;
use crate::request::{check_chunks, check_document, check_model, check_name};
use crate::scorer::{Asked, Scorers};
use crate::sections::{Chunk, Sections, keyed};
use crate::worker::{Described, Workers, passed_on, within, worth_another};
use cacheclip_rpc::convert::id_bytes;
use cacheclip_rpc::status::{invalid, retry_after, unavailable};
use cacheclip_rpc::v1;
use cacheclip_service::request_id;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::{Code, Request, Status, Streaming};

/// Where progress goes.
pub(crate) type Progress = mpsc::Sender<Result<v1::IngestProgress, Status>>;

/// A busy worker is asked this often before the stream fails.
const ATTEMPTS: u32 = 8;
/// Pause before asking again when a busy worker gave no hint.
const PAUSE: Duration = Duration::from_millis(500);

/// What became of a batch.
struct Computed {
    /// How many of the chunks were computed now.
    computed: usize,
    /// Tokens of all of them.
    tokens: usize,
    /// Whether a scorer has their auxiliary KV, or there are no scorers.
    prepared: bool,
}

/// Computes documents' chunks. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Ingest {
    pub(crate) workers: Workers,
    pub(crate) scorers: Scorers,
    pub(crate) sections: Sections,
    pub(crate) batch: usize,
    /// Longest wait for one batch.
    pub(crate) limit: Duration,
    /// Longest wait for the next document.
    pub(crate) idle: Duration,
}

impl Ingest {
    /// Takes documents until the caller has sent the last or goes away.
    pub(crate) async fn run(
        &self,
        tenant: String,
        mut documents: Streaming<v1::IngestRequest>,
        progress: Progress,
    ) {
        let work = async {
            let mut index = 0;
            while let Some(document) = within(self.idle, "the next document", documents.message()).await? {
                self.document(index, document, &tenant, &progress).await?;
                index += 1;
            }
            Ok::<_, Status>(())
        };
        let failed = tokio::select! {
            finished = work => finished.err(),
            () = progress.closed() => None,
        };
        if let Some(status) = failed {
            // The caller may be gone by now; then nobody needs the status.
            let _ = progress.send(Err(status)).await;
        }
    }

    async fn document(
        &self,
        index: usize,
        document: v1::IngestRequest,
        tenant: &str,
        progress: &Progress,
    ) -> Result<(), Status> {
        let within = format!("documents[{index}].");
        let described = self.workers.described()?;
        check_model(&format!("{within}model"), &document.model, &described)?;
        check_name(&format!("{within}salt"), &document.salt)?;
        check_document(&format!("{within}document"), &document.document)?;
        if document.document.is_empty() && document.ttl_seconds > 0 {
            let why = "must not be empty where ttl_seconds is set: only a document expires";
            return Err(invalid(&format!("{within}document"), why));
        }
        if document.chunks.is_empty() {
            return Err(invalid(&format!("{within}chunks"), "must not be empty"));
        }
        // The whole document is checked before any of it is computed.
        check_chunks(&within, &document.chunks)?;
        let hold = (!document.document.is_empty()).then(|| v1::Hold {
            document: id_bytes(self.sections.document(tenant, &document.salt, &document.document).as_bytes()),
            ttl_seconds: document.ttl_seconds,
        });
        let mut done = v1::IngestProgress { document: document.document, ..Default::default() };
        let mut chunks = document.chunks.into_iter().enumerate();
        loop {
            let batch: Vec<_> = chunks.by_ref().take(self.batch.max(1)).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let batch = self.tokenise(&within, batch, tenant, &document.salt, &described).await?;
            let Computed { computed, tokens, prepared } =
                self.compute(&batch, hold.as_ref(), &described).await?;
            done.chunks_done += batch.len() as u32;
            done.chunks_computed += computed as u32;
            done.tokens += tokens as u64;
            done.chunks_unprepared += if prepared { 0 } else { batch.len() as u32 };
            metrics::ingested(computed, batch.len() - computed);
            // A caller that is gone is noticed by `run`.
            let _ = progress.send(Ok(done.clone())).await;
        }
    }

    async fn tokenise(
        &self,
        within: &str,
        batch: Vec<(usize, v1::Chunk)>,
        tenant: &str,
        salt: &str,
        described: &Arc<Described>,
    ) -> Result<Vec<Chunk>, Status> {
        let (sections, described) = (self.sections.clone(), Arc::clone(described));
        let (within, tenant, salt) = (within.to_owned(), tenant.to_owned(), salt.to_owned());
        crate::blocking(move || {
            let one = |(index, chunk)| {
                sections.chunk(&format!("{within}chunks[{index}].text"), chunk, &tenant, &salt, &described)
            };
            batch.into_iter().map(one).collect()
        })
        .await?
    }

    async fn compute(
        &self,
        batch: &[Chunk],
        hold: Option<&v1::Hold>,
        described: &Described,
    ) -> Result<Computed, Status> {
        let asked: Vec<Asked> = batch.iter().map(|chunk| chunk.asked.clone()).collect();
        let request = v1::PrecomputeRequest {
            layout: id_bytes(described.layout_id.as_bytes()),
            anchor: id_bytes(described.anchor.as_bytes()),
            chunks: batch.iter().map(|chunk| keyed(&chunk.key, &chunk.section)).collect(),
            hold: hold.cloned(),
        };
        let (reply, prepared) =
            tokio::join!(self.precompute(request), self.scorers.prepare(&asked, hold, self.limit));
        let computed = reply?.computed.into_iter().filter(|computed| *computed).count();
        Ok(Computed {
            computed: computed.min(batch.len()),
            tokens: batch.iter().map(|chunk| chunk.section.ids.len()).sum(),
            prepared,
        })
    }

    /// Ingest is the one caller that can wait: where all workers are busy with questions, it comes back later.
    async fn precompute(&self, request: v1::PrecomputeRequest) -> Result<v1::PrecomputeResponse, Status> {
        let wanted = wanted(&request.chunks);
        let (mut attempt, mut tried) = (1, Vec::new());
        loop {
            let Some(worker) = self.workers.choose(&wanted, &tried) else {
                return Err(unavailable("no worker was found; send the document again"));
            };
            let mut client = self.workers.client(&worker);
            let call = client.precompute(request_id::outgoing(Request::new(request.clone())));
            let reply = tokio::select! {
                reply = within(self.limit, "the worker's precomputation", call) => reply,
                () = worker.lost() => Err(unavailable("the worker fell silent; send the document again")),
            };
            let failed = match reply {
                Ok(reply) => return Ok(reply.into_inner()),
                Err(failed) => failed,
            };
            tried.push(worker.endpoint().to_owned());
            if worth_another(&failed) && self.workers.choose(&wanted, &tried).is_some() {
                continue;
            }
            if failed.code() != Code::ResourceExhausted || attempt == ATTEMPTS {
                return Err(match failed.code() {
                    Code::FailedPrecondition => self.workers.explain(failed).await,
                    _ => passed_on(&failed, "worker"),
                });
            }
            tokio::time::sleep(retry_after(&failed).unwrap_or(PAUSE)).await;
            attempt += 1;
            tried.clear();
        }
    }
}
