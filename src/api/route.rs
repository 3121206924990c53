//! The whole API as one `match`. Knows names, not what stands behind them.

use crate::error::{ApiError, Code};

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Ask,
    Streaming,
    History,
    Livez,
    Readyz,
}

impl Endpoint {
    /// Answers without a key, and also while the server drains.
    pub fn is_public(self) -> bool {
        matches!(self, Endpoint::Livez | Endpoint::Readyz)
    }

    /// Reads a JSON body.
    pub fn takes_json(self) -> bool {
        matches!(self, Endpoint::Ask | Endpoint::Streaming)
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
        "/livez" => (Endpoint::Livez, GET),
        "/readyz" => (Endpoint::Readyz, GET),
        _ => {
            return Err(ApiError::new(
                Code::NotFound,
                "there is nothing at this path; paths are exact, without a slash at the end",
            ));
        }
    };
    if allow.split(", ").any(|allowed| allowed == method) {
        return Ok(endpoint);
    }
    let mut e = ApiError::new(Code::MethodNotAllowed, format!("this path takes {allow}"));
    e.allow = Some(allow);
    Err(e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_methods_are_exact() {
        assert_eq!(route("POST", "/api/ask").ok(), Some(Endpoint::Ask));
        assert_eq!(route("HEAD", "/livez").ok(), Some(Endpoint::Livez));
        let status = |method, path| route(method, path).err().map(|e| (e.code.status(), e.allow));
        assert_eq!(status("POST", "/api/ask/"), Some((404, None)));
        assert_eq!(status("GET", "/api/ask"), Some((405, Some("POST"))));
        assert_eq!(status("get", "/livez"), Some((405, Some("GET, HEAD"))));
    }
}
