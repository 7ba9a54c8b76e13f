//! The admin port: `/metrics`, `/live`, `/ready`. Plain HTTP, for machines on the inside.

use crate::readiness::Readiness;
use crate::telemetry;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

pub(crate) fn router(readiness: Readiness) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(move || async move { ready(&readiness) }))
}

async fn metrics() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], telemetry::render())
}

fn ready(readiness: &Readiness) -> (StatusCode, String) {
    match (readiness.is_ready(), readiness.why()) {
        (true, why) if why.is_empty() => (StatusCode::OK, "ready\n".into()),
        (true, why) => (StatusCode::OK, format!("ready, but: {why}\n")),
        (false, why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
    }
}
