//! `cacheclip ingest`: precomputes the KV of documents, with a progress bar.

use crate::text;
use anyhow::Context as _;
use cacheclip::fleet;
use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_rpc::v1::{Chunk, IngestRequest};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::process::ExitCode;
use tonic::transport::Channel;

/// Arguments of `ingest`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Text files; paragraphs (separated by empty lines) become chunks.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Seconds after which the documents' KV expires unless they are ingested again; 0: never.
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    ttl_seconds: u64,
    /// Gateway to send them to.
    #[arg(long, default_value = "http://127.0.0.1:7070")]
    gateway: String,
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut client = fleet::connect(&arguments.gateway).await?;
    let documents = arguments.files.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
    let total = send_for(&mut client, documents, arguments.ttl_seconds, "ingest").await?;
    text::line(format_args!(
        "{} chunks, {} computed now, {} tokens",
        total.chunks, total.computed, total.tokens
    ));
    if total.unprepared > 0 {
        text::line(format_args!(
            "{} chunks were not prepared by a scorer: ingest again, so that scoring them is fast and deleting them complete",
            total.unprepared
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn read(path: &PathBuf) -> anyhow::Result<(String, Vec<String>)> {
    let content = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let chunks = content.split("\n\n").map(str::trim).filter(|chunk| !chunk.is_empty()).map(str::to_owned);
    Ok((path.display().to_string(), chunks.collect()))
}

/// What an ingest did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Total {
    pub(crate) chunks: u64,
    pub(crate) computed: u64,
    pub(crate) tokens: u64,
    pub(crate) unprepared: u64,
}

impl Total {
    fn plus(self, other: Self) -> Self {
        Self {
            chunks: self.chunks + other.chunks,
            computed: self.computed + other.computed,
            tokens: self.tokens + other.tokens,
            unprepared: self.unprepared + other.unprepared,
        }
    }
}

/// Sends documents (name and chunks) and follows their progress.
pub(crate) async fn send(
    client: &mut GatewayClient<Channel>,
    documents: Vec<(String, Vec<String>)>,
    label: &'static str,
) -> anyhow::Result<Total> {
    send_for(client, documents, 0, label).await
}

/// The same for documents that expire after so many seconds; 0: never.
async fn send_for(
    client: &mut GatewayClient<Channel>,
    documents: Vec<(String, Vec<String>)>,
    ttl_seconds: u64,
    label: &'static str,
) -> anyhow::Result<Total> {
    let bar = ProgressBar::new(documents.iter().map(|(_, chunks)| chunks.len() as u64).sum());
    bar.set_style(
        ProgressStyle::with_template("{prefix} [{bar:40}] {pos}/{len} chunks {msg}")?.progress_chars("=> "),
    );
    bar.set_prefix(label);
    let requests = documents.into_iter().map(|(document, chunks)| IngestRequest {
        document,
        chunks: chunks.into_iter().map(|text| Chunk { text, corpus: String::new() }).collect(),
        ttl_seconds,
        ..Default::default()
    });
    let requests: Vec<IngestRequest> = requests.collect();
    let mut progress = client.ingest(tokio_stream::iter(requests)).await?.into_inner();
    // Messages carry running totals of one document, and documents come one after the other.
    let (mut ended, mut current) = (Total::default(), Total::default());
    let mut document = None;
    while let Some(done) = progress.message().await? {
        if document.as_ref() != Some(&done.document) {
            ended = ended.plus(current);
            document = Some(done.document.clone());
        }
        current = Total {
            chunks: u64::from(done.chunks_done),
            computed: u64::from(done.chunks_computed),
            tokens: done.tokens,
            unprepared: u64::from(done.chunks_unprepared),
        };
        bar.set_position(ended.plus(current).chunks);
        bar.set_message(done.document);
    }
    bar.finish_and_clear();
    Ok(ended.plus(current))
}
