//! What a caller sent, checked: every mistake is INVALID_ARGUMENT and names its field.

use crate::worker::Described;
use cacheclip_plan::Policy;
use cacheclip_rpc::status::invalid;
use cacheclip_rpc::v1;
use std::time::Instant;
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Longest name of a tenant or corpus, and longest salt, in bytes.
const LONGEST_NAME: usize = 256;
/// Longest name of a document, in bytes: a long path.
const LONGEST_DOCUMENT: usize = 4096;
/// The tenant of callers that name none.
const DEFAULT_TENANT: &str = "default";

/// A generation that is worth tokenising.
#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) tenant: String,
    /// `None`: the model's default head.
    pub(crate) prefix: Option<String>,
    pub(crate) chunks: Vec<v1::Chunk>,
    pub(crate) question: String,
    pub(crate) policy: Policy,
    pub(crate) ratio: Option<f32>,
    pub(crate) strict: bool,
    pub(crate) sampling: v1::Sampling,
    pub(crate) salt: String,
    pub(crate) received: Instant,
}

impl Generation {
    /// Checks what can be checked without tokens. Limits and stops that the caller left open are filled in.
    pub(crate) fn check(
        request: v1::GenerateRequest,
        tenant: String,
        described: &Described,
        default_answer: u32,
        default_stop: &[String],
    ) -> Result<Self, Status> {
        check_model("model", &request.model, described)?;
        check_chunks("", &request.chunks)?;
        check_name("salt", &request.salt)?;
        if request.question.is_empty() {
            return Err(invalid("question", "must not be empty"));
        }
        let policy: Policy = request.policy.parse().map_err(|error| invalid("policy", error))?;
        if !described.policies.iter().any(|known| known == policy.name()) {
            let known = described.policies.join(", ");
            return Err(invalid(
                "policy",
                format_args!("the worker does not offer {}; choose {known}", policy.name()),
            ));
        }
        // NaN is within no range.
        if let Some(ratio) = request.ratio.filter(|ratio| !(0.0..=1.0).contains(ratio)) {
            return Err(invalid("ratio", format_args!("{ratio} is not within 0..1")));
        }
        let sampling = sampling(request.sampling.unwrap_or_default(), default_answer, default_stop)?;
        Ok(Self {
            tenant,
            prefix: request.prefix.filter(|prefix| !prefix.is_empty()),
            chunks: request.chunks,
            question: request.question,
            policy,
            ratio: request.ratio,
            strict: request.strict,
            sampling,
            salt: request.salt,
            received: Instant::now(),
        })
    }
}

fn sampling(mut sampling: v1::Sampling, answer: u32, stop: &[String]) -> Result<v1::Sampling, Status> {
    // The worker's range: a request that it would refuse is refused before it is begun.
    if !(0.0..=100.0).contains(&sampling.temperature) {
        return Err(invalid(
            "sampling.temperature",
            format_args!("{} is not within 0..100", sampling.temperature),
        ));
    }
    if !(0.0..=1.0).contains(&sampling.top_p) {
        return Err(invalid("sampling.top_p", format_args!("{} is not within 0..1", sampling.top_p)));
    }
    if let Some(index) = sampling.stop.iter().position(String::is_empty) {
        return Err(invalid(
            &format!("sampling.stop[{index}]"),
            "must not be empty: it would end every answer",
        ));
    }
    if sampling.max_tokens == 0 {
        sampling.max_tokens = answer;
    }
    if sampling.stop.is_empty() {
        sampling.stop = stop.to_vec();
    }
    Ok(sampling)
}

/// Checks a model's name; `field` is where it stands.
pub(crate) fn check_model(field: &str, model: &str, described: &Described) -> Result<(), Status> {
    if model.is_empty() || model == described.model {
        return Ok(());
    }
    Err(invalid(field, format_args!("unknown model {model:?}; this gateway serves {:?}", described.model)))
}

/// Checks a list of chunks; `within` is what its field stands in (`documents[3].` for ingest).
pub(crate) fn check_chunks(within: &str, chunks: &[v1::Chunk]) -> Result<(), Status> {
    for (index, chunk) in chunks.iter().enumerate() {
        if chunk.text.is_empty() {
            return Err(invalid(&format!("{within}chunks[{index}].text"), "must not be empty"));
        }
        check_name(&format!("{within}chunks[{index}].corpus"), &chunk.corpus)?;
    }
    Ok(())
}

pub(crate) fn check_name(field: &str, name: &str) -> Result<(), Status> {
    at_most(LONGEST_NAME, field, name)
}

/// Checks a document's name.
pub(crate) fn check_document(field: &str, name: &str) -> Result<(), Status> {
    at_most(LONGEST_DOCUMENT, field, name)
}

fn at_most(bytes: usize, field: &str, name: &str) -> Result<(), Status> {
    if name.len() > bytes {
        return Err(invalid(field, format_args!("has {} bytes, {bytes} are allowed", name.len())));
    }
    Ok(())
}

/// The tenant that a request's metadata names. Authentication comes with TLS; until then the name is believed.
pub(crate) fn tenant(metadata: &MetadataMap, header: &str) -> Result<String, Status> {
    let Some(value) = metadata.get(header) else { return Ok(DEFAULT_TENANT.into()) };
    let name = value.to_str().map_err(|_| invalid(header, "must be ASCII text"))?;
    if name.is_empty() {
        return Err(invalid(header, "must not be empty"));
    }
    check_name(header, name)?;
    Ok(name.into())
}
