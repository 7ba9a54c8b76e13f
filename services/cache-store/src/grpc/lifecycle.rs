//! Claims, deletion of documents, and pins, as clients ask for them.

use super::{Service, keys};
use crate::core::Core;
use crate::journal::{Claim, Size};
use cacheclip_chunk::DocumentId;
use cacheclip_rpc::convert::{id, id_bytes};
use cacheclip_rpc::status::{invalid, unavailable};
use cacheclip_rpc::v1::{
    DeleteDocumentRequest, DeleteDocumentResponse, Hold, HoldRequest, HoldResponse, PinRequest, PinResponse,
    Tier, TierDeletion, UnpinRequest,
};
use std::io;
use tonic::Status;

/// Longest time of a pin: one that was forgotten must not keep its room for ever.
const LONGEST_PIN: u64 = 24 * 3600;

impl Service {
    /// A claim from a request's field.
    pub(super) fn claim(&self, field: &str, hold: &Hold) -> Result<Claim, Status> {
        let document: DocumentId = id(&format!("{field}.document"), &hold.document)?;
        Ok(self.core.claim(document, hold.ttl_seconds))
    }

    pub(super) async fn add_claims(&self, request: HoldRequest) -> Result<HoldResponse, Status> {
        let (layout, keys) = (id("layout", &request.layout)?, keys(&request.keys)?);
        let hold = request.hold.ok_or_else(|| invalid("hold", "is missing: whose claim is it?"))?;
        let claim = self.claim("hold", &hold)?;
        let begun = self.core.began(request.generation);
        self.change("claims are not written", move |core| core.hold(layout, &keys, claim, begun)).await?;
        Ok(HoldResponse { generation: self.core.journal.generation() })
    }

    pub(super) async fn delete_claimed(
        &self,
        request: DeleteDocumentRequest,
    ) -> Result<DeleteDocumentResponse, Status> {
        let (document, further) = (id("document", &request.document)?, keys(&request.keys)?);
        let receipt = self
            .change("deletion is not complete", move |core| core.delete_document(document, &further))
            .await?;
        let tier = |tier: Tier, size: Size| TierDeletion {
            tier: tier.into(),
            objects: size.objects,
            bytes: size.bytes,
        };
        let mut tiers = vec![tier(Tier::StoreDisk, receipt.disk), tier(Tier::StoreRam, receipt.ram)];
        if self.core.bucket.is_some() {
            tiers.push(tier(Tier::StoreBucket, receipt.bucket));
        }
        Ok(DeleteDocumentResponse {
            generation: receipt.generation,
            tiers,
            keys: receipt.keys.iter().map(|key| id_bytes(key.as_bytes())).collect(),
            kept: receipt.kept,
        })
    }

    pub(super) async fn pin_keys(&self, request: PinRequest) -> Result<PinResponse, Status> {
        let (layout, keys) = (id("layout", &request.layout)?, keys(&request.keys)?);
        let seconds = request.seconds;
        if !(1..=LONGEST_PIN).contains(&seconds) {
            return Err(invalid(
                "seconds",
                format!("is {seconds}, must be 1 to {LONGEST_PIN}; pin again later"),
            ));
        }
        let pinned =
            self.change("pins are not written", move |core| core.pin(layout, &keys, seconds)).await?;
        Ok(PinResponse { keys: pinned })
    }

    pub(super) async fn unpin_keys(&self, request: UnpinRequest) -> Result<PinResponse, Status> {
        let (layout, keys) = (id("layout", &request.layout)?, keys(&request.keys)?);
        let unpinned = self.change("pins are not written", move |core| core.unpin(layout, &keys)).await?;
        Ok(PinResponse { keys: unpinned })
    }

    /// A change of journal and files, which a failing disk may break off; asking again goes on with it.
    async fn change<T: Send + 'static>(
        &self,
        what: &str,
        change: impl FnOnce(&Core) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Status> {
        let changed = self.blocking(change).await?;
        changed.map_err(|error| {
            tracing::error!(%error, "{what}");
            unavailable(format!("{what}: {error}; ask again"))
        })
    }
}
