//! The service behind the HTTP door: admits, authenticates, answers each request and logs it. Knows
//! the doors through what they offer; HTTP's bytes, ureq and SQL are theirs.

mod ask;
mod completions;
mod history;
mod once;
mod route;
mod streaming;
mod system;

use std::borrow::Cow;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use subtle::ConstantTimeEq;

use crate::config::{ApiKey, Config};
use crate::error::{ApiError, Code, Header, add_headers};
use crate::head::Head;
use crate::http::{Call, Connections, Reply, Responder, Site};
use crate::pool::Pool;
use crate::rate_limit::RateLimit;
use crate::store::Store;
use crate::upstream::Line;
use once::Once;
use route::Endpoint;

/// Everything a request needs.
pub struct Api {
    config: Config,
    store: Arc<Store>,
    pool: Pool<Line>,
    connections: Connections,
    rate_limit: RateLimit,
    once: Once,
    draining: AtomicBool,
    in_flight: AtomicUsize,
    ids: (RandomState, AtomicU64),
    anonymous: Arc<str>,
}

/// What is known of a request that was let in.
pub struct Admitted {
    endpoint: Endpoint,
    /// Name of the client's key.
    key: Arc<str>,
}

/// What became of an answer, for the log.
#[derive(Default)]
struct Done {
    status: u16,
    bytes: u64,
    model: Option<String>,
    code: Option<Code>,
}

impl Api {
    /// The service on these doors.
    pub fn new(config: Config, store: Arc<Store>, pool: Pool<Line>, connections: Connections) -> Api {
        Api {
            rate_limit: RateLimit::new(config.rate_limit_per_minute),
            once: Once::default(),
            config,
            store,
            pool,
            connections,
            draining: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            ids: (RandomState::new(), AtomicU64::new(0)),
            anonymous: "anonymous".into(),
        }
    }

    /// From now on new requests are refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Requests that are being answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// The name of the key that the request brings. Errs with 401 and says what is wrong.
    fn authenticate(&self, head: &Head) -> Result<Arc<str>, ApiError> {
        if self.config.api_keys.is_empty() {
            return Ok(Arc::clone(&self.anonymous));
        }
        let Some(given) = head.field("authorization") else {
            return Err(unauthorized("no key given"));
        };
        let secret = match given.split_once(' ') {
            Some((scheme, secret)) if scheme.eq_ignore_ascii_case("bearer") => secret.trim_start(),
            _ => given,
        };
        find_key(&self.config.api_keys, secret).ok_or_else(|| unauthorized("wrong key"))
    }

    fn respond(&self, endpoint: Endpoint, request: &Request, responder: Responder) -> Done {
        let headers = match endpoint.asks() {
            true => self.rate_limit.take(request.key, Instant::now()),
            false => Ok(Vec::new()),
        };
        let headers = match headers {
            Ok(headers) => headers,
            Err(e) => return refuse(responder, e, request.id),
        };
        let answered = match endpoint {
            Endpoint::Ask => ask::ask(self, request, &responder),
            Endpoint::Streaming => return streaming::stream(self, request, responder, headers),
            Endpoint::ChatCompletions => return completions::chat(self, request, responder, headers),
            Endpoint::Models => completions::models(self, request, &responder),
            Endpoint::History => history::history(self, request).map(Answered::from),
            Endpoint::Livez => Ok(system::livez().into()),
            Endpoint::Readyz => Ok(system::readyz(self).into()),
        };
        send_answered(responder, answered, headers, request.id)
    }
}

/// A whole answer, and the model in it for the log.
struct Answered {
    reply: Reply,
    model: Option<String>,
}

impl From<Reply> for Answered {
    fn from(reply: Reply) -> Answered {
        Answered { reply, model: None }
    }
}

/// A request that was let in, as the endpoints see it.
struct Request<'a> {
    id: &'a str,
    key: &'a Arc<str>,
    path: &'a str,
    query: &'a str,
    idempotency_key: Option<&'a str>,
    body: &'a [u8],
    started: Instant,
}

impl Site for Api {
    type Admitted = Admitted;

    fn admit(&self, head: &Head) -> (Option<Admitted>, Result<(), ApiError>) {
        let endpoint = match route::route(head.method(), head.path()) {
            Ok(endpoint) if endpoint.is_public() => {
                return (Some(Admitted { endpoint, key: Arc::clone(&self.anonymous) }), Ok(()));
            }
            Ok(endpoint) => endpoint,
            Err(e) => return (None, Err(e)),
        };
        let key = match self.authenticate(head) {
            Ok(key) => key,
            Err(e) => return (None, Err(e)),
        };
        let verdict = if self.draining.load(Ordering::SeqCst) {
            Err(ApiError::new(Code::ShuttingDown, "the server is shutting down; try again, on a new connection"))
        } else if endpoint.asks() && !head.field("content-type").is_none_or(is_json) {
            Err(ApiError::new(Code::UnsupportedMediaType, "the body must be JSON: send Content-Type: application/json"))
        } else {
            Ok(())
        };
        (Some(Admitted { endpoint, key }), verdict)
    }

    fn answer(&self, call: Call<Admitted>, responder: Responder) {
        let _running = Running::new(&self.in_flight);
        let (admitted, head) = (call.admitted.as_ref(), call.head.as_ref());
        let done = match (admitted, head, call.body) {
            (Some(admitted), Some(head), Ok(body)) => {
                let request = Request {
                    id: &call.id,
                    key: &admitted.key,
                    path: head.path(),
                    query: head.query(),
                    idempotency_key: head.field("idempotency-key"),
                    body: &body,
                    started: call.started,
                };
                self.respond(admitted.endpoint, &request, responder)
            }
            (_, _, Err(e)) => refuse(responder, e, &call.id),
            _ => refuse(responder, ApiError::new(Code::Internal, "a request was answered that was not let in"), &call.id),
        };
        let key = admitted.filter(|admitted| !admitted.endpoint.is_public()).map(|admitted| &*admitted.key);
        let (method, path) = head.map_or(("-", "-"), |head| (head.method(), head.path()));
        log::info!(
            "request id={} client={} key={} method={method} path={path:.200} status={} ms={:.1} bytes={} model={} code={}",
            call.id,
            call.peer,
            key.unwrap_or("-"),
            done.status,
            call.started.elapsed().as_secs_f64() * 1000.0,
            done.bytes,
            done.model.as_deref().map_or(Cow::Borrowed("-"), one_word),
            done.code.map_or("-", Code::name),
        );
    }

    fn new_id(&self) -> String {
        let mut hasher = self.ids.0.build_hasher();
        hasher.write_u64(self.ids.1.fetch_add(1, Ordering::Relaxed));
        format!("{:016x}", hasher.finish())
    }
}

/// Counts a request as long as it lives.
struct Running<'a>(&'a AtomicUsize);

impl<'a> Running<'a> {
    fn new(count: &'a AtomicUsize) -> Running<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Running(count)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn unauthorized(what: &str) -> ApiError {
    let text = format!("{what}; send Authorization: Bearer KEY with one of the server's API_KEYS");
    ApiError::new(Code::Unauthorized, text).with_header("WWW-Authenticate", "Bearer")
}

/// Compares with every key, each over the same length, so that time tells nothing about any.
fn find_key(keys: &[ApiKey], secret: &str) -> Option<Arc<str>> {
    let padded = |text: &str| {
        let mut bytes = [0; ApiKey::MAX_SECRET];
        let len = text.len().min(bytes.len());
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        bytes
    };
    let given = padded(secret);
    let mut found = None;
    for key in keys {
        let same = given.ct_eq(&padded(&key.secret)) & (secret.len() as u64).ct_eq(&(key.secret.len() as u64));
        if same.into() {
            found = Some(Arc::clone(&key.name));
        }
    }
    found
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// A model's name as one word of a log line.
fn one_word(text: &str) -> Cow<'_, str> {
    if text.len() <= 100 && text.bytes().all(|b| b.is_ascii_graphic()) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(text.chars().take(100).map(|c| if c.is_alphanumeric() || c.is_ascii_graphic() { c } else { '_' }).collect())
    }
}

fn send(responder: Responder, reply: &Reply, model: Option<String>, code: Option<Code>) -> Done {
    match responder.send(reply) {
        Ok(bytes) => Done { status: reply.status, bytes, model, code },
        Err(_) => Done { status: reply.status, bytes: 0, model, code: Some(Code::ClientGone) },
    }
}

fn send_answered(responder: Responder, answered: Result<Answered, ApiError>, headers: Vec<Header>, id: &str) -> Done {
    match answered {
        Ok(Answered { mut reply, model }) => {
            add_headers(&mut reply.headers, headers);
            send(responder, &reply, model, None)
        }
        Err(e) => refuse(responder, e.with_headers(headers), id),
    }
}

fn refuse(responder: Responder, e: ApiError, id: &str) -> Done {
    if e.code == Code::ClientGone {
        return Done { status: e.code.status(), code: Some(e.code), ..Done::default() };
    }
    let mut reply = Reply::json(e.code.status(), e.to_json(id));
    reply.headers.extend(e.retry_after.map(|wait| (Cow::Borrowed("Retry-After"), wait)));
    reply.headers.extend(e.headers);
    send(responder, &reply, None, Some(e.code))
}

fn overloaded(config: &Config) -> ApiError {
    let text = format!("all {} workers are busy and the queue of {} is full; try again", config.workers, config.queue_size);
    ApiError::new(Code::Overloaded, text)
}

/// A worker's thread ended without a word: its job panicked.
fn lost() -> ApiError {
    ApiError::new(Code::Internal, "the server failed at this request; its log says where")
}
