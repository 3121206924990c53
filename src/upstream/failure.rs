//! What the upstream's failures are to our clients, and whether another attempt or another model may do better. Knows answers
//! that are none, not how they were asked for.

use std::io::{ErrorKind, Read};
use std::time::{Duration, SystemTime};

use ureq::Body;
use ureq::http::{HeaderMap, Response};

use super::Upstream;
use super::watch::Ended;
use crate::error::{ApiError, Code, Header};
use crate::openai;

/// An error answer is read so far for its words.
const MAX_ERROR_BODY: u64 = 64 * 1024;

/// Why an attempt or a stream failed, and whether another may do better.
pub struct Failure {
    pub error: ApiError,
    /// It may go by: another attempt may succeed, or another model.
    pub passing: bool,
    /// How long the upstream asked to be left alone.
    pub(super) wait: Option<Duration>,
    /// A 404: another model may be there.
    pub(super) unknown_model: bool,
    /// The server does not know the option by which a stream tells its usage.
    pub(super) refuses_usage: bool,
}

impl From<ApiError> for Failure {
    /// There is no use in another attempt.
    fn from(error: ApiError) -> Failure {
        Failure { error, passing: false, wait: None, unknown_model: false, refuses_usage: false }
    }
}

impl From<ApiError> for Box<Failure> {
    // Not inlined: each stream waits with every page of stack that was used.
    #[inline(never)]
    fn from(error: ApiError) -> Box<Failure> {
        Box::new(error.into())
    }
}

/// A failure of TLS. A certificate that is not believed is none the next time, either.
fn insecure(why: &str) -> (Code, String, bool) {
    let is_disbelieved = why.contains("certificate");
    let todo = if why.contains("CaUsedAsEndEntity") {
        "a server's certificate must be made with basicConstraints=CA:FALSE"
    } else if is_disbelieved {
        "check OPENAI_BASE_URL and UPSTREAM_CA_FILE"
    } else {
        "check OPENAI_BASE_URL"
    };
    (Code::UPSTREAM_UNAVAILABLE, format!("no secure connection to the LLM: {why}; {todo}"), !is_disbelieved)
}

const RETRY_AFTER: &str = "Retry-After";
/// What OpenAI's own clients look at first.
const RETRY_AFTER_MS: &str = "retry-after-ms";

/// A wait that is asked for, as it came, where it can stand in our answer.
fn asked<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let value = headers.get(name)?.to_str().ok()?;
    (1..=64).contains(&value.len()).then_some(value)
}

fn wait_in_ms(headers: &HeaderMap) -> Option<Duration> {
    let ms: f64 = asked(headers, RETRY_AFTER_MS)?.trim().parse().ok()?;
    lasting(ms / 1000.0)
}

/// What is too long for a `Duration` is the longest; nonsense is none.
fn lasting(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok().or((seconds > 0.0).then_some(Duration::MAX))
}

/// `Retry-After` in either of its forms (RFC 9110, section 10.2.3); nonsense is none, and what is too long for a `Duration`
/// the longest.
fn wait_of(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse::<f64>() {
        return lasting(seconds);
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

impl Upstream {
    /// A call that was over before the upstream had answered, and not by its doing.
    pub(super) fn ended(&self, ended: Ended) -> ApiError {
        match ended {
            Ended::ClientGone => ApiError::client_gone(),
            Ended::TimedOut => {
                let text =
                    format!("the LLM did not answer within {} s (UPSTREAM_TIMEOUT_SECS)", self.config.upstream_timeout.as_secs());
                // Another try would take as long once more.
                self.failed(Code::UPSTREAM_TIMEOUT, &text).pointless_to_retry()
            }
        }
    }

    /// An attempt that failed without an answer's head.
    pub(super) fn unanswered(&self, error: &ureq::Error) -> Box<Failure> {
        let (code, text, passing) = match error {
            // As rustls tells what is wrong with its peer.
            ureq::Error::Io(e) if e.kind() == ErrorKind::InvalidData => insecure(&e.to_string()),
            e @ (ureq::Error::Tls(_) | ureq::Error::Rustls(_)) => insecure(&e.to_string()),
            ureq::Error::Io(e) if e.kind() == ErrorKind::UnexpectedEof => {
                let text = "the LLM closed the connection before it answered; check OPENAI_BASE_URL, http or https, too";
                (Code::UPSTREAM_UNAVAILABLE, text.to_string(), true)
            }
            ureq::Error::Io(e) => {
                let text = format!("the LLM cannot be reached: {e}; check OPENAI_BASE_URL, and whether it runs");
                (Code::UPSTREAM_UNAVAILABLE, text, true)
            }
            e => (Code::UPSTREAM_BAD_ANSWER, format!("the LLM's answer is not HTTP as it should be: {e}"), false),
        };
        let mut error = self.failed(code, &text);
        // A certificate that is not believed: all else of this code may pass.
        if !passing && code == Code::UPSTREAM_UNAVAILABLE {
            error = error.pointless_to_retry();
        }
        Box::new(Failure { passing, ..error.into() })
    }

    /// An answer with a status that is not a success; `fields` of its head mean something to clients.
    pub(super) fn refused(&self, mut response: Response<Body>, fields: Vec<Header>) -> Box<Failure> {
        let status = response.status().as_u16();
        let mut body = Vec::new();
        // Words that cannot be read are words that are not there.
        let _ = response.body_mut().as_reader().take(MAX_ERROR_BODY).read_to_end(&mut body);
        let (words, param) = openai::error_told(&body);
        let (code, what) = match status {
            300..=399 => (Code::UPSTREAM_ERROR, "redirected, which is not followed; check OPENAI_BASE_URL"),
            400 | 413 | 422 => (Code::UPSTREAM_REJECTED, "rejected the request"),
            401 => (Code::UPSTREAM_ERROR, "refused the server's key; check OPENAI_API_KEY"),
            402 => (Code::UPSTREAM_ERROR, "says that its account has no money left"),
            403 => (Code::UPSTREAM_ERROR, "does not allow this, or not with the server's key"),
            404 => (Code::UPSTREAM_ERROR, "has nothing there; check OPENAI_BASE_URL and the model"),
            408 => (Code::UPSTREAM_TIMEOUT, "was too slow"),
            429 => (Code::UPSTREAM_RATE_LIMITED, "limits the rate"),
            503 | 529 => (Code::UPSTREAM_UNAVAILABLE, "is not available"),
            _ => (Code::UPSTREAM_ERROR, "failed"),
        };
        let words = if status < 400 { "" } else { words.as_str() };
        let mut error = self.failed_saying(code, &format!("the LLM {what} ({status})"), words);
        let headers = response.headers();
        for name in [RETRY_AFTER, RETRY_AFTER_MS] {
            if let (429 | 503, Some(clean)) = (code.status(), asked(headers, name).filter(|value| !self.has_secret(value))) {
                error = error.with_header(name, clean);
            }
        }
        error.headers.extend(fields.into_iter().filter(|(name, _)| name.starts_with("x-ratelimit-")));
        // OpenAI's word for an account without money, which no waiting fills.
        let quota = status == 429 && body.windows(18).any(|w| w == b"insufficient_quota");
        let wait = wait_in_ms(headers).or(asked(headers, RETRY_AFTER).and_then(wait_of));
        if code == Code::UPSTREAM_REJECTED {
            error.param = param.map(|param| self.redact(&param).into());
        }
        error.no_quota = quota;
        if quota || matches!(status, 300..=407 | 410..=428 | 430..=499) {
            error = error.pointless_to_retry();
        }
        let passing = matches!(status, 408 | 429 | 500..=599) && !quota;
        let refuses_usage = code == Code::UPSTREAM_REJECTED && String::from_utf8_lossy(&body).contains("stream_options");
        Box::new(Failure { error, passing, wait, unknown_model: status == 404, refuses_usage })
    }
}

#[cfg(test)]
mod tests {
    use ureq::http::HeaderValue;

    use super::*;

    #[test]
    fn retry_after_is_a_number_a_date_or_nothing() {
        assert_eq!(wait_of("3"), Some(Duration::from_secs(3)));
        assert_eq!(wait_of("0.5"), Some(Duration::from_millis(500)));
        assert_eq!(wait_of("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert_eq!(wait_of("99999999999999999999"), Some(Duration::MAX));
        for nonsense in ["soon", "-1", "NaN", ""] {
            assert_eq!(wait_of(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn the_wait_may_come_in_milliseconds() {
        let wait = |ms: &'static str| {
            wait_in_ms(&[("retry-after-ms".parse().expect("a name"), HeaderValue::from_static(ms))].into_iter().collect())
        };
        assert_eq!(wait("1500"), Some(Duration::from_millis(1500)));
        assert_eq!(wait("1e300"), Some(Duration::MAX));
        assert_eq!((wait("soon"), wait("-1"), wait_in_ms(&HeaderMap::new())), (None, None, None));
    }
}
