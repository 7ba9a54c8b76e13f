//! Every mistake of a caller is INVALID_ARGUMENT, names its field in text and in details, and harms nobody else.

mod support;

use cacheclip_rpc::v1::{Chunk, GenerateRequest, GetCapabilitiesRequest, IngestRequest, Sampling};
use support::{TestFleet, chunk, corpus, data, over, soon, under};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

/// The status is about exactly this field, says so twice, and gives a reason.
fn names(refused: &Status, field: &str) {
    assert_eq!(refused.code(), Code::InvalidArgument, "{field}: {refused}");
    let (named, why) = refused.message().split_once(": ").unwrap_or_default();
    assert_eq!(named, field, "{refused}");
    assert!(!why.is_empty(), "{refused}");
    let details = refused.get_details_bad_request().expect("google.rpc.BadRequest");
    let fields: Vec<&str> = details.field_violations.iter().map(|it| it.field.as_str()).collect();
    assert_eq!(fields, [field]);
    assert!(!details.field_violations[0].description.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_request_is_refused_by_the_name_of_its_field_and_the_service_lives_on() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(401, 1);
    let good = over(&corpus, &corpus.questions[0]);
    let before = fleet.answer(good.clone()).await;

    let described = soon(fleet.client().get_capabilities(GetCapabilitiesRequest {})).await;
    let longest = described.expect("capabilities").into_inner().models[0].max_tokens as usize;
    assert!(longest > 0);
    // At least one token per word.
    let long = "word ".repeat(longest);
    let chunks = |texts: &[&str]| GenerateRequest {
        chunks: texts.iter().copied().map(chunk).collect(),
        ..good.clone()
    };
    let sampling = |change: fn(&mut Sampling)| {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        GenerateRequest { sampling: Some(sampling), ..good.clone() }
    };
    let first = corpus.documents[0].text.as_str();
    let many: Vec<&str> = corpus.documents.iter().cycle().take(64).map(|it| it.text.as_str()).collect();
    let cases = [
        ("chunks[0].text", chunks(&[""])),
        ("chunks[1].text", chunks(&[first, "", first])),
        ("chunks[1].text", chunks(&[first, &long])),
        (
            "chunks[0].corpus",
            GenerateRequest {
                chunks: vec![Chunk { text: first.into(), corpus: "c".repeat(10_000) }],
                ..good.clone()
            },
        ),
        ("chunks", chunks(&many)),
        ("question", GenerateRequest { question: String::new(), ..good.clone() }),
        ("question", GenerateRequest { question: long, chunks: Vec::new(), ..good.clone() }),
        ("ratio", under(&good, "cacheclip", Some(-0.1))),
        ("ratio", under(&good, "cacheclip", Some(1.1))),
        ("ratio", under(&good, "stale", Some(f32::NAN))),
        ("ratio", under(&good, "full", Some(f32::INFINITY))),
        ("model", GenerateRequest { model: "nobody".into(), ..good.clone() }),
        ("policy", under(&good, "fastest", None)),
        ("policy", under(&good, "CacheClip", None)),
        ("salt", GenerateRequest { salt: "s".repeat(10_000), ..good.clone() }),
        ("sampling.max_tokens", sampling(|it| it.max_tokens = u32::MAX)),
        ("sampling.temperature", sampling(|it| it.temperature = -1.0)),
        ("sampling.temperature", sampling(|it| it.temperature = f32::NAN)),
        ("sampling.temperature", sampling(|it| it.temperature = 1e6)),
        ("sampling.top_p", sampling(|it| it.top_p = 1.5)),
        ("sampling.stop[1]", sampling(|it| it.stop = vec!["x".into(), String::new()])),
    ];
    for (field, request) in cases {
        let refused = fleet.ask(request).await.expect_err(field);
        names(&refused, field);
    }
    let known = fleet.ask(under(&good, "fastest", None)).await.expect_err("no such policy");
    for policy in ["cacheclip", "cacheclip-paper", "stale", "full"] {
        assert!(known.message().contains(policy), "it says what may be chosen: {known}");
    }

    let after = fleet.answer(good).await;
    assert!(after.all_hit(), "{:?}", after.explain());
    assert_eq!(after.text(), before.text());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_answered_up_to_the_models_length_and_refused_one_token_beyond() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(402, 1);
    let described = soon(fleet.client().get_capabilities(GetCapabilitiesRequest {})).await;
    let longest = described.expect("capabilities").into_inner().models[0].max_tokens;
    let answer_of = |max_tokens| GenerateRequest {
        sampling: Some(Sampling { max_tokens, ..Default::default() }),
        ..over(&corpus, &corpus.questions[0])
    };
    let prompt = fleet.answer(answer_of(1)).await.usage().prompt_tokens;
    let room = longest - prompt;
    assert!(fleet.ask(answer_of(room)).await.is_ok(), "{prompt} + {room} of {longest}");
    names(&fleet.ask(answer_of(room + 1)).await.expect_err("one too many"), "sampling.max_tokens");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_document_is_refused_by_the_name_of_its_field_and_ingest_lives_on() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(403, 1);
    let document = |texts: &[&str]| IngestRequest {
        chunks: texts.iter().copied().map(chunk).collect(),
        ..Default::default()
    };
    let text = corpus.documents[0].text.as_str();
    let model = || IngestRequest { model: "nobody".into(), ..document(&[text]) };
    let cases = [
        ("documents[0].chunks", vec![document(&[])]),
        ("documents[0].chunks[1].text", vec![document(&[text, ""])]),
        ("documents[1].chunks[0].text", vec![document(&[text]), document(&[""])]),
        ("documents[0].salt", vec![IngestRequest { salt: "s".repeat(10_000), ..document(&[text]) }]),
        ("documents[0].model", vec![model()]),
    ];
    for (field, documents) in cases {
        let refused = fleet.ingest(documents).await.expect_err(field);
        names(&refused, field);
    }
    assert_eq!(fleet.ingest_corpus(&corpus).await.chunks as usize, corpus.documents.len());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_must_have_a_name_where_it_names_itself() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(404, 1);
    let ask = |tenant: String| {
        let mut request = Request::new(over(&corpus, &corpus.questions[0]));
        request.metadata_mut().insert("x-tenant", tenant.parse().expect("ASCII"));
        fleet.ask(request)
    };
    for tenant in [String::new(), "t".repeat(1000)] {
        names(&ask(tenant).await.expect_err("no name"), "x-tenant");
    }
    assert!(ask("somebody".into()).await.is_ok());
    fleet.stop().await;
}
