//! `cacheclip delete`: a document's KV goes from the whole fleet, with a receipt.

use crate::text;
use cacheclip::fleet;
use cacheclip_rpc::v1::{DeleteIngestedRequest, DeletionReceipt};
use serde::Serialize;
use std::process::ExitCode;

/// Exit code while somebody has not answered.
const PENDING: u8 = 3;

/// Arguments of `delete`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The document's name as it was ingested: `ingest` takes the path as it is written there.
    document: String,
    /// Print the receipt as JSON.
    #[arg(long)]
    json: bool,
    /// The salt that it was ingested with.
    #[arg(long, default_value = "")]
    salt: String,
    /// Gateway to ask.
    #[arg(long, default_value = "http://127.0.0.1:7070")]
    gateway: String,
}

/// A receipt as JSON.
#[derive(Debug, Serialize)]
struct Receipt {
    document: String,
    generation: u64,
    tiers: Vec<Tier>,
    kept: u32,
    pending: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Tier {
    tier: &'static str,
    objects: u32,
    bytes: u64,
}

impl From<DeletionReceipt> for Receipt {
    fn from(receipt: DeletionReceipt) -> Self {
        let DeletionReceipt { document, generation, tiers, kept, pending } = receipt;
        let tier = |it: &cacheclip_rpc::v1::TierDeletion| Tier {
            tier: it.tier().label(),
            objects: it.objects,
            bytes: it.bytes,
        };
        Self { document, generation, tiers: tiers.iter().map(tier).collect(), kept, pending }
    }
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut client = fleet::connect(&arguments.gateway).await?;
    let Arguments { document, json, salt, .. } = arguments;
    let request = DeleteIngestedRequest { document, salt, ..Default::default() };
    let receipt = Receipt::from(client.delete_document(request).await?.into_inner());
    if json {
        text::json(&receipt)?;
    } else {
        print(&receipt);
    }
    Ok(if receipt.pending.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(PENDING) })
}

fn print(receipt: &Receipt) {
    text::line(format_args!(
        "{}: generation {}, {} chunks stay because another document holds them",
        receipt.document, receipt.generation, receipt.kept
    ));
    for tier in &receipt.tiers {
        text::line(format_args!("  {:<12} {:>6} objects  {:>12} bytes", tier.tier, tier.objects, tier.bytes));
    }
    for holder in &receipt.pending {
        text::line(format_args!(
            "  pending: {holder} has not answered and may still hold something; ask again"
        ));
    }
}
