//! What can go wrong, in the two audiences' words: `ApiError` for a client, `StartError` for whoever
//! starts the program. Knows no module of this crate and nothing of HTTP beyond status numbers and
//! header fields.

use std::borrow::Cow;

/// The cause of a refused or failed request, as listed in the README's error table: its machine-readable name, which goes
/// out as `error.code`, and the HTTP status it comes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(&'static str, u16);

impl Code {
    pub const INVALID_JSON: Code = Code("invalid_json", 400);
    pub const BAD_REQUEST: Code = Code("bad_request", 400);
    pub const UPSTREAM_REJECTED: Code = Code("upstream_rejected", 400);
    pub const UNAUTHORIZED: Code = Code("unauthorized", 401);
    pub const NOT_FOUND: Code = Code("not_found", 404);
    pub const METHOD_NOT_ALLOWED: Code = Code("method_not_allowed", 405);
    pub const REQUEST_TIMEOUT: Code = Code("request_timeout", 408);
    pub const BODY_TOO_LARGE: Code = Code("body_too_large", 413);
    pub const URI_TOO_LONG: Code = Code("uri_too_long", 414);
    pub const UNSUPPORTED_MEDIA_TYPE: Code = Code("unsupported_media_type", 415);
    pub const EXPECTATION_FAILED: Code = Code("expectation_failed", 417);
    pub const INVALID_REQUEST: Code = Code("invalid_request", 422);
    pub const HEADERS_TOO_LARGE: Code = Code("headers_too_large", 431);
    pub const RATE_LIMITED: Code = Code("rate_limited", 429);
    pub const UPSTREAM_RATE_LIMITED: Code = Code("upstream_rate_limited", 429);
    /// Never sent, since nobody is there to read it: it stands in the log, as nginx has it.
    pub const CLIENT_GONE: Code = Code("client_gone", 499);
    pub const INTERNAL: Code = Code("internal_error", 500);
    pub const UPSTREAM_ERROR: Code = Code("upstream_error", 502);
    pub const UPSTREAM_BAD_ANSWER: Code = Code("upstream_bad_answer", 502);
    pub const UPSTREAM_UNAVAILABLE: Code = Code("upstream_unavailable", 503);
    pub const UPSTREAM_TIMEOUT: Code = Code("upstream_timeout", 503);
    pub const OVERLOADED: Code = Code("overloaded", 503);
    pub const SHUTTING_DOWN: Code = Code("shutting_down", 503);
    pub const HISTORY_UNAVAILABLE: Code = Code("history_unavailable", 503);
    pub const VERSION_NOT_SUPPORTED: Code = Code("http_version_not_supported", 505);

    /// `error.code`.
    pub fn name(self) -> &'static str {
        self.0
    }

    /// The HTTP status, 400 to 599.
    pub fn status(self) -> u16 {
        self.1
    }

    /// The usual `error.type`, in OpenAI's vocabulary, by which SDKs choose an exception class.
    fn kind(self) -> &'static str {
        match self.status() {
            401 => "authentication_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }
}

/// Why a request failed: a status while nothing of an answer went out, an event of the stream after that.
#[derive(Debug)]
pub struct ApiError {
    pub code: Code,
    /// For people: the cause, and what to do about it.
    pub message: Box<str>,
    /// The request field at fault.
    pub param: Option<Box<str>>,
    /// The upstream's account has no money left: `insufficient_quota` is then its `error.type`, as clients know it.
    pub no_quota: bool,
    /// Header fields of the answer.
    pub headers: Vec<Header>,
    /// For the log: what the upstream did, in none of its words.
    pub cause: Option<Box<str>>,
}

/// A header field of an answer: name and value.
pub type Header = (Cow<'static, str>, String);

impl ApiError {
    /// An error of `code` with a text for people; every 503 gets `Retry-After: 1` here.
    pub fn new(code: Code, message: impl Into<Box<str>>) -> ApiError {
        let e = ApiError { code, message: message.into(), param: None, no_quota: false, headers: Vec::new(), cause: None };
        if code.status() == 503 { e.with_header("Retry-After", "1") } else { e }
    }

    /// Nobody is there any more to be answered: it stands in the log only.
    pub fn client_gone() -> ApiError {
        ApiError::new(Code::CLIENT_GONE, "the client went away")
    }

    /// The server ends: nothing new is begun, and what its clients wait for is given up when the grace is over.
    pub fn shutting_down() -> ApiError {
        ApiError::new(Code::SHUTTING_DOWN, "the server is shutting down; try again, on a new connection")
    }

    /// A 422 that names the field at fault.
    pub fn invalid(param: &str, message: impl Into<Box<str>>) -> ApiError {
        ApiError { param: Some(param.into()), ..ApiError::new(Code::INVALID_REQUEST, message) }
    }

    /// The same error with this header field, in place of one of the same name.
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> ApiError {
        add_headers(&mut self.headers, vec![(Cow::Borrowed(name), value.into())]);
        self
    }

    /// The same error, telling SDKs that asking again is of no use (OpenAI's `x-should-retry`).
    pub fn pointless_to_retry(self) -> ApiError {
        self.with_header("x-should-retry", "false")
    }

    /// The JSON object of this error, `{"error": {...}}`, in the shape of
    /// <https://platform.openai.com/docs/guides/error-codes>, with the id of the request it answers.
    pub fn to_json(&self, request_id: &str) -> String {
        serde_json::json!({"error": {
            "message": self.message,
            "type": if self.no_quota { "insufficient_quota" } else { self.code.kind() },
            "code": self.code.name(),
            "param": self.param,
            "request_id": request_id,
        }})
        .to_string()
    }
}

/// Adds header fields of ours, in place of those of the same name that are there, such as the upstream's.
pub fn add_headers(headers: &mut Vec<Header>, ours: Vec<Header>) {
    headers.retain(|(name, _)| !ours.iter().any(|(our, _)| our.eq_ignore_ascii_case(name)));
    headers.extend(ours);
}

/// Takes the upstream's own id of a request out of the fields that are passed on from it.
pub fn take_id(headers: &mut Vec<Header>) -> Option<String> {
    let place = headers.iter().position(|(name, _)| name == "x-request-id")?;
    Some(headers.remove(place).1)
}

/// A request's id that cannot break a line of the log.
pub fn is_sane_id(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// The media type in the value of a `Content-Type`, in lower case and without its parameters (RFC 9110, section 8.3.1).
pub fn media_type(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Why the program does not start or has to stop: one line for stderr, and the exit code.
#[derive(Debug)]
pub struct StartError {
    pub message: String,
    /// 2 for what the caller typed or set, 1 for what the machine refused.
    pub exit: u8,
}

impl StartError {
    /// A bad command line or setting: exit code 2.
    pub fn usage(message: impl Into<String>) -> StartError {
        StartError { message: message.into(), exit: 2 }
    }

    /// The machine does not let us: exit code 1.
    pub fn machine(message: impl Into<String>) -> StartError {
        StartError { message: message.into(), exit: 1 }
    }
}
