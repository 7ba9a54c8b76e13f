//! Why a gateway does not start.

/// What kept a gateway from starting.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of the configuration cannot be used.
    #[error("{field}: {reason}")]
    Option {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The model directory cannot be used.
    #[error("model_dir")]
    Prompt(#[from] cacheclip_prompt::Error),
    /// A port cannot be bound or an endpoint cannot be dialled.
    #[error(transparent)]
    Service(#[from] cacheclip_service::Error),
    /// The worker did not describe itself in time.
    #[error("the worker at {endpoint} did not describe itself: {status}; start it, or correct `workers`")]
    Worker {
        /// Where it should be.
        endpoint: String,
        /// The last answer.
        status: Box<tonic::Status>,
    },
    /// The worker has another model than this gateway tokenises for.
    #[error(
        "the worker's {what} is not the one in model_dir; give gateway and worker the same model directory"
    )]
    Mismatch {
        /// What differs.
        what: &'static str,
    },
}
