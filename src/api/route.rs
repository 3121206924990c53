//! The whole API as one `match`. Knows names, not what stands behind them.

use crate::error::{ApiError, Code};
use crate::openai::model_in_path;

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Ask,
    Streaming,
    History,
    ChatCompletions,
    Models,
    Livez,
    Readyz,
    Metrics,
    /// A file of the pages, by its path.
    Page,
}

impl Endpoint {
    /// The names of all endpoints in metrics, in their order, and of what is none of them.
    pub const NAMES: &[&str] =
        &["ask", "streaming", "history", "chat_completions", "models", "livez", "readyz", "metrics", "page", Endpoint::NONE];
    /// Requests without an endpoint: a wrong path, method or key, or broken HTTP.
    pub const NONE: &str = "none";

    /// The endpoint's name in metrics.
    pub fn name(self) -> &'static str {
        Endpoint::NAMES[self as usize]
    }

    /// Answers without a key, and also while the server drains.
    pub fn is_public(self) -> bool {
        matches!(self, Endpoint::Livez | Endpoint::Readyz | Endpoint::Metrics | Endpoint::Page)
    }

    /// Asks the LLM a question, in a JSON body.
    pub fn takes_question(self) -> bool {
        matches!(self, Endpoint::Ask | Endpoint::Streaming | Endpoint::ChatCompletions)
    }
}

/// The endpoint for a method and a path, exactly as sent. Errs with 404 or 405.
pub fn route(method: &str, path: &str) -> Result<Endpoint, ApiError> {
    const GET: &str = "GET, HEAD";
    const POST: &str = "POST";
    let (endpoint, allow) = match path {
        "/api/ask" => (Endpoint::Ask, POST),
        "/api/streaming" => (Endpoint::Streaming, POST),
        "/api/history" => (Endpoint::History, GET),
        "/v1/chat/completions" => (Endpoint::ChatCompletions, POST),
        "/v1/models" => (Endpoint::Models, GET),
        _ if path.strip_prefix("/v1/models/").and_then(model_in_path).is_some() => (Endpoint::Models, GET),
        "/livez" => (Endpoint::Livez, GET),
        "/readyz" => (Endpoint::Readyz, GET),
        "/metrics" => (Endpoint::Metrics, GET),
        "/" | "/console.css" | "/console.js" | "/openapi.json" => (Endpoint::Page, GET),
        "/docs" | "/docs/docs.js" | "/docs/swagger-ui.css" | "/docs/swagger-ui-bundle.js" => (Endpoint::Page, GET),
        _ => {
            let is_openais = ["/completions", "/models", "/responses", "/embeddings"].iter().any(|end| path.ends_with(end));
            let text = match path.starts_with("/v1/") {
                true => "of OpenAI's API there are /v1/chat/completions, /v1/models and /v1/models/NAME here; paths are exact",
                false if is_openais => "OpenAI's API is below /v1 here: a client's base URL is this server's address and /v1",
                false => "there is nothing at this path; paths are exact, without a slash at the end",
            };
            return Err(ApiError::new(Code::NOT_FOUND, text));
        }
    };
    if allow.split(", ").any(|allowed| allowed == method) {
        return Ok(endpoint);
    }
    Err(ApiError::new(Code::METHOD_NOT_ALLOWED, format!("this path takes {allow}")).with_header("Allow", allow))
}
