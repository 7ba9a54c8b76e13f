//! One question, asked with cold and warm chunks, with full prefill and with stale reuse.

use super::report::{Chunk, QuestionReport, Ttft};
use anyhow::Context as _;
use cacheclip_bench::{Corpus, Question};
use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_rpc::v1::generate_event::Event;
use cacheclip_rpc::v1::{self, Done, GenerateRequest, Sampling};
use std::time::Instant;
use tonic::transport::Channel;

/// One answer as the client saw it.
#[derive(Debug)]
pub(crate) struct Answer {
    /// From sending the request to the first token's arrival.
    pub(crate) ttft_ms: f64,
    /// The final message.
    pub(crate) done: Done,
}

/// Asks once and waits for the end.
pub(crate) async fn ask(
    client: &mut GatewayClient<Channel>,
    request: GenerateRequest,
) -> anyhow::Result<Answer> {
    let began = Instant::now();
    let mut events = client.generate(request).await?.into_inner();
    let mut first = None;
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Token(_)) => {
                first.get_or_insert_with(|| began.elapsed());
            }
            Some(Event::Done(done)) => {
                // An answer of nothing but an end token has no token event.
                let ttft = first.unwrap_or_else(|| began.elapsed());
                return Ok(Answer { ttft_ms: ttft.as_secs_f64() * 1e3, done });
            }
            _ => {}
        }
    }
    anyhow::bail!("the answer ended without its final message")
}

/// The request for a question: chunks in its order, greedy.
pub(crate) fn request(chunks: Vec<String>, question: &str, policy: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        chunks: chunks.into_iter().map(|text| v1::Chunk { text, corpus: String::new() }).collect(),
        question: question.to_owned(),
        policy: policy.to_owned(),
        sampling: Some(Sampling { max_tokens, ..Default::default() }),
        ..Default::default()
    }
}

/// Cold CacheClip, full prefill, stale reuse, warm CacheClip.
pub(crate) async fn ask_all_ways(
    client: &mut GatewayClient<Channel>,
    corpus: &Corpus,
    question: &Question,
    ratio: Option<f32>,
) -> anyhow::Result<QuestionReport> {
    let chunks: Vec<String> =
        question.chunks.iter().map(|&index| corpus.documents[index].text.clone()).collect();
    let asked = |policy: &str| request(chunks.clone(), &question.text, policy, 24);
    // A salt of its own narrows reuse to this request: nothing is known of its chunks.
    let cold = GenerateRequest { salt: format!("cold {}", question.text), ratio, ..asked("cacheclip") };
    let cold = ask(client, cold).await.context("cold")?;
    let full = ask(client, asked("full")).await.context("full prefill")?;
    let stale = ask(client, asked("stale")).await.context("stale reuse")?;
    let reuse = ask(client, GenerateRequest { ratio, ..asked("cacheclip") }).await.context("reuse")?;
    let explain = reuse.done.explain.unwrap_or_default();
    let text = |done: &Done| done.text.trim().to_owned();
    Ok(QuestionReport {
        family: question.family,
        question: question.text.trim().to_owned(),
        expected: question.answer.clone(),
        answer: reuse.done.text.trim().to_owned(),
        cold_answer: text(&cold.done),
        full_answer: text(&full.done),
        stale_answer: text(&stale.done),
        rung: explain.rung,
        realised_ratio: explain.realised_ratio,
        chunks: explain
            .chunks
            .iter()
            .map(|chunk| Chunk {
                document: question.chunks[chunk.index as usize],
                tokens: chunk.tokens,
                hit: chunk.hit,
                tier: chunk.tier().label().to_owned(),
                reason: (!chunk.hit).then(|| chunk.reason().label().to_owned()),
                recomputed: chunk.recomputed,
                recomputed_bytes: chunk.recomputed_spans.iter().map(|s| (s.start, s.end)).collect(),
            })
            .collect(),
        ttft_ms: Ttft { cold: cold.ttft_ms, full: full.ttft_ms, reuse: reuse.ttft_ms },
    })
}
