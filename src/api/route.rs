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
    /// A file of the pages, by its name there.
    Page(&'static str),
}

impl Endpoint {
    /// The names of all endpoints in metrics, and of what is none of them.
    pub const NAMES: &[&str] =
        &["ask", "streaming", "history", "chat_completions", "models", "livez", "readyz", "metrics", "page", Endpoint::NONE];
    /// Requests without an endpoint: a wrong path, method or key, or broken HTTP.
    pub const NONE: &str = "none";

    /// The endpoint's name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Endpoint::Ask => "ask",
            Endpoint::Streaming => "streaming",
            Endpoint::History => "history",
            Endpoint::ChatCompletions => "chat_completions",
            Endpoint::Models => "models",
            Endpoint::Livez => "livez",
            Endpoint::Readyz => "readyz",
            Endpoint::Metrics => "metrics",
            Endpoint::Page(_) => "page",
        }
    }

    /// Answers without a key, and also while the server drains.
    pub fn is_public(self) -> bool {
        matches!(self, Endpoint::Livez | Endpoint::Readyz | Endpoint::Metrics | Endpoint::Page(_))
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
        _ if path.strip_prefix("/v1/models/").is_some_and(is_model) => (Endpoint::Models, GET),
        "/livez" => (Endpoint::Livez, GET),
        "/readyz" => (Endpoint::Readyz, GET),
        "/metrics" => (Endpoint::Metrics, GET),
        "/" => (Endpoint::Page("console.html"), GET),
        "/console.css" => (Endpoint::Page("console.css"), GET),
        "/console.js" => (Endpoint::Page("console.js"), GET),
        "/openapi.json" => (Endpoint::Page("openapi.json"), GET),
        "/docs" => (Endpoint::Page("docs.html"), GET),
        "/docs/docs.js" => (Endpoint::Page("docs.js"), GET),
        "/docs/swagger-ui.css" => (Endpoint::Page("swagger-ui.css"), GET),
        "/docs/swagger-ui-bundle.js" => (Endpoint::Page("swagger-ui-bundle.js"), GET),
        _ => {
            return Err(ApiError::new(
                Code::NOT_FOUND,
                "there is nothing at this path; paths are exact, without a slash at the end",
            ));
        }
    };
    if allow.split(", ").any(|allowed| allowed == method) {
        return Ok(endpoint);
    }
    Err(ApiError::new(Code::METHOD_NOT_ALLOWED, format!("this path takes {allow}")).with_header("Allow", allow))
}

/// A name that a model may have.
fn is_model(name: &str) -> bool {
    let name = model_in_path(name);
    let sane = |b: u8| b.is_ascii_alphanumeric() || b"._-:@/~".contains(&b);
    (1..=200).contains(&name.len()) && name.bytes().all(sane) && name.split('/').all(|step| !matches!(step, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_methods_are_exact() {
        assert_eq!(route("POST", "/api/ask").ok(), Some(Endpoint::Ask));
        assert_eq!(route("HEAD", "/livez").ok(), Some(Endpoint::Livez));
        assert_eq!(route("GET", "/v1/models/openai/gpt-4o:free").ok(), Some(Endpoint::Models));
        let status = |method, path| route(method, path).err().map(|e| (e.code.status(), e.headers.first().map(|h| h.1.clone())));
        assert_eq!(status("POST", "/api/ask/"), Some((404, None)));
        assert_eq!(status("GET", "/v1/models/"), Some((404, None)));
        assert_eq!(status("GET", "/v1/models/../x"), Some((404, None)));
        assert_eq!(status("GET", "/api/ask"), Some((405, Some("POST".to_string()))));
        assert_eq!(status("get", "/livez"), Some((405, Some("GET, HEAD".to_string()))));
    }
}
