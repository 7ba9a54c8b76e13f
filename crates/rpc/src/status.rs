//! Errors as gRPC statuses that tell the caller what to do.

use std::fmt::Display;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// INVALID_ARGUMENT for one field: `field: why`, and the field again as `google.rpc.BadRequest`.
pub fn invalid(field: &str, why: impl Display) -> Status {
    let why = why.to_string();
    let message = format!("{field}: {why}");
    Status::with_error_details(
        Code::InvalidArgument,
        message,
        ErrorDetails::with_bad_request_violation(field, why),
    )
}

/// RESOURCE_EXHAUSTED with `google.rpc.RetryInfo`: the same request may succeed after `retry_after`.
pub fn exhausted(what: impl Display, retry_after: Duration) -> Status {
    let details = ErrorDetails::with_retry_info(Some(retry_after));
    Status::with_error_details(Code::ResourceExhausted, what.to_string(), details)
}

/// FAILED_PRECONDITION: the two sides speak of KV that cannot be exchanged, because of `field`.
pub fn mismatch(field: &str, ours: impl Display, theirs: impl Display) -> Status {
    Status::failed_precondition(format!(
        "{field}: this service has {ours} and the request names {theirs}; ask it to describe itself again"
    ))
}

/// UNAVAILABLE: nothing is wrong with the request, it may be sent again or elsewhere.
pub fn unavailable(what: impl Display) -> Status {
    Status::unavailable(what.to_string())
}

/// What a status advises on when to come back, if it does.
pub fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info().and_then(|info| info.retry_delay)
}

/// The field an INVALID_ARGUMENT names, if it names one.
pub fn invalid_field(status: &Status) -> Option<String> {
    status.get_details_bad_request()?.field_violations.into_iter().next().map(|violation| violation.field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_argument_names_its_field_in_text_and_in_details() {
        let status = invalid("chunks[2].text", "is empty");
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "chunks[2].text: is empty");
        assert_eq!(invalid_field(&status).as_deref(), Some("chunks[2].text"));
    }

    #[test]
    fn an_exhausted_service_says_when_to_come_back() {
        let status = exhausted("full", Duration::from_millis(250));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(retry_after(&status), Some(Duration::from_millis(250)));
        assert_eq!(retry_after(&unavailable("gone")), None);
    }
}
