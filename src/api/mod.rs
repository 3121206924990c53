//! The service behind the HTTP door: admits, authenticates, answers each request and logs it. Knows
//! the doors through what they offer; HTTP's bytes, ureq and SQL are theirs.
//!
//! A request is answered in two steps: `prepare` does what needs no LLM, on the thread that read the request;
//! what is left, an `Errand`, is run on a worker.

mod ask;
mod history;
mod models;
mod once;
mod pages;
mod places;
mod route;
mod streaming;
mod system;

use std::borrow::Cow;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq;

use crate::config::{self, ApiKey, Config};
use crate::error::{ApiError, Code, Header, StartError, add_headers, media_type};
use crate::exchange::Question;
use crate::http::{self, Call, Connections, Head, Reply, Responder};
use crate::kernel;
use crate::metrics::Metrics;
use crate::openai::Chat;
use crate::pool::Pool;
use crate::rate_limit::RateLimit;
use crate::relay::Pulse;
use crate::store::Store;
use crate::upstream::Line;
use once::Once;
use places::{Places, Taken};
use route::Endpoint;

const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// So many answers are put together out of the history at once: each takes several times its bytes.
const MOST_MAKING: usize = 8;
/// So long the others wait.
const MAKING_PATIENCE: Duration = Duration::from_secs(10);
/// Where so many requests are in flight, and the LLM answers within `QUICK`, the CPU is what all wait for. A worker that is
/// woken lets who runs go on then (`SCHED_BATCH`): 5 % more questions get through. With a slow LLM it takes its turn at once.
const CROWD: usize = 8;
const QUICK: Duration = Duration::from_millis(25);
/// Answers of more bytes than this count while they are on their way.
const LARGE_ANSWER: usize = 256 * 1024;
/// And so many bytes of them may be.
const MOST_LEAVING: usize = 128 << 20;
/// The longest body of a request that needs none, in bytes: it is read, since the next request stands behind it.
const NEEDLESS_BODY: usize = 16 * 1024;

/// Everything a request needs.
pub struct Api {
    config: Arc<Config>,
    store: Arc<Store>,
    workers: Arc<Pool<Line>>,
    connections: Arc<Connections>,
    metrics: Arc<Metrics>,
    started: Instant,
    pulse: Pulse,
    rate_limit: RateLimit,
    once: Arc<Once>,
    /// For pages of history and repetitions that are put together.
    making: Arc<Places>,
    /// For the bytes of large answers on their way to slow clients.
    leaving: Arc<Places>,
    draining: AtomicBool,
    in_flight: Arc<AtomicUsize>,
    anonymous: Arc<str>,
}

/// What is known of a request that was let in.
pub struct Admitted {
    endpoint: Endpoint,
    /// Name of the client's key.
    key: Arc<str>,
    /// Its request counts from its head on.
    in_flight: Option<InFlight>,
}

/// What is left to do of a request: ask the LLM.
pub struct Errand {
    /// The socket of who waits for it.
    pub client: Arc<TcpStream>,
    kind: Kind,
    since: Instant,
}

enum Kind {
    Whole(Box<ask::Whole>),
    Stream(Box<streaming::Stream>),
    Models(Box<models::Models>),
}

/// A request that was let in, as the endpoints see it.
pub struct Request<'a> {
    endpoint: Endpoint,
    key: &'a Arc<str>,
    head: &'a Head,
    body: &'a [u8],
    started: Instant,
}

/// What became of an answer, for the log.
#[derive(Default)]
struct Done {
    status: u16,
    bytes: u64,
    model: Option<String>,
    code: Option<Code>,
}

impl Errand {
    fn new(client: Arc<TcpStream>, kind: Kind) -> Errand {
        Errand { client, kind, since: Instant::now() }
    }

    fn refuse<T>(self, e: ApiError) -> Option<T> {
        match self.kind {
            Kind::Whole(whole) => whole.exit.refuse(e),
            Kind::Stream(stream) => stream.refuse(e),
            Kind::Models(models) => models.exit.refuse(e),
        }
    }
}

impl Api {
    /// The service on these doors. Errs where there is no thread for it.
    pub fn new(
        config: Arc<Config>,
        store: Arc<Store>,
        workers: Arc<Pool<Line>>,
        connections: Arc<Connections>,
        metrics: Arc<Metrics>,
    ) -> Result<Api, StartError> {
        Ok(Api {
            pulse: Pulse::start(config.stream_heartbeat)?,
            rate_limit: RateLimit::new(config.rate_limit_per_minute),
            once: Arc::default(),
            making: Places::new(MOST_MAKING),
            leaving: Places::new(MOST_LEAVING),
            config,
            store,
            workers,
            connections,
            metrics,
            started: Instant::now(),
            draining: AtomicBool::new(false),
            in_flight: Arc::default(),
            anonymous: "anonymous".into(),
        })
    }

    /// Zeros of everything that is counted.
    pub fn metrics(config: &Config) -> Metrics {
        Metrics::new(Endpoint::NAMES, &config.models())
    }

    /// From now on new requests are refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Preparing a question may wait for the history.
    pub fn is_in_trouble(&self) -> bool {
        self.store.is_failing()
    }

    /// Requests that are being answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// This request may go to a worker without a reader between: it is for the LLM, has to wait for no other
    /// request, and its client takes what it is given.
    pub fn suits_worker(call: &Call<Admitted>) -> bool {
        let asks = call.admitted.as_ref().is_some_and(|admitted| admitted.endpoint.takes_question()) && call.body.is_ok();
        asks && call.head.as_ref().is_some_and(|head| head.field(IDEMPOTENCY_KEY).is_none()) && call.responder.is_idle()
    }

    /// Answers what can be answered without the LLM; else returns what is left to do.
    pub fn prepare(&self, mut call: Call<Admitted>) -> Option<Errand> {
        let entry = Entry::new(self, &mut call);
        let mut exit = Exit { responder: call.responder, headers: Vec::new(), entry };
        let (admitted, head, body) = match (&call.admitted, &call.head, call.body) {
            (Some(admitted), Some(head), Ok(body)) => (admitted, head, body),
            (_, _, Err(e)) => return exit.refuse(e),
            _ => return exit.refuse(ApiError::new(Code::INTERNAL, "a request was let in without a head")),
        };
        let request = Request { endpoint: admitted.endpoint, key: &admitted.key, head, body: &body, started: call.started };
        if admitted.endpoint.takes_question() {
            match self.rate_limit.take(&admitted.key, Instant::now()) {
                Ok(headers) => exit.headers = headers,
                Err(e) => return exit.refuse(e),
            }
        }
        match admitted.endpoint {
            Endpoint::Ask | Endpoint::Streaming | Endpoint::ChatCompletions => match self.chat(admitted.endpoint, &body) {
                Ok(chat) if chat.stream => streaming::prepare(self, &request, exit, chat),
                Ok(chat) => ask::prepare(self, &request, exit, chat),
                Err(e) => exit.refuse(e),
            },
            Endpoint::Models => {
                let client = exit.responder.client();
                Some(Errand::new(client, Kind::Models(Box::new(models::Models::new(&request, exit)))))
            }
            Endpoint::History => match history::history(self, &request) {
                Ok(reply) => self.give(exit, reply, None),
                Err(e) => exit.refuse(e),
            },
            Endpoint::Livez => exit.send(system::livez(), None),
            Endpoint::Readyz => exit.send(system::readyz(self), None),
            Endpoint::Metrics => exit.send(system::metrics(self), None),
            Endpoint::Page(name) => match pages::page(name) {
                Ok(reply) => exit.send(reply, None),
                Err(e) => exit.refuse(e),
            },
        }
    }

    /// A place for an answer that is put together out of the history. Errs with 503 where there is none for long.
    fn make(&self) -> Result<Taken, ApiError> {
        let place = self.making.take(1, MAKING_PATIENCE);
        place.ok_or_else(|| ApiError::new(Code::OVERLOADED, "too much is being read from the history; try again"))
    }

    /// Answers with what can be asked for again: with 503 where too much is on its way to slow clients already.
    fn give(&self, exit: Exit, reply: Reply, model: Option<String>) -> Option<Errand> {
        match self.room_for(&reply) {
            Some(_place) => exit.send(reply, model),
            None => {
                let text = format!("{MOST_LEAVING} bytes of large answers are on their way to slow clients; try again");
                exit.refuse(ApiError::new(Code::OVERLOADED, text))
            }
        }
    }

    /// A place among the answers on their way, until this one is out; `None`: there is no room.
    fn room_for(&self, reply: &Reply) -> Option<Taken> {
        let count = if reply.body.len() > LARGE_ANSWER { reply.body.len() } else { 0 };
        self.leaving.take(count, Duration::ZERO)
    }

    /// What is asked of the LLM: by one question, or by a client's own chat request.
    fn chat(&self, endpoint: Endpoint, body: &[u8]) -> Result<Chat, ApiError> {
        // A byte order mark, as some editors write it, may be ignored (RFC 8259, section 8.1).
        let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
        let Config { model, system_prompt, max_question_chars, .. } = &*self.config;
        if endpoint == Endpoint::ChatCompletions {
            return Chat::from_body(body, model, *max_question_chars);
        }
        let asked = Question::parse(body, *max_question_chars)?;
        Ok(Chat::from_question(asked, model, system_prompt.as_deref(), endpoint == Endpoint::Streaming))
    }

    /// Runs an errand to its answer; returns the answer where the client may be slow to take it.
    pub fn run(&self, errand: Errand, line: &mut Line) -> Option<Parting> {
        self.metrics.queue_wait.observe(errand.since.elapsed());
        if self.connections.were_shut() {
            return errand.refuse(ApiError::shutting_down());
        }
        // Whoever left while waiting for a worker is not worth a call, nor a pair.
        if http::is_gone(&errand.client) {
            return errand.refuse(ApiError::client_gone());
        }
        match errand.kind {
            Kind::Whole(whole) => {
                let parting = whole.run(self, line, errand.client);
                kernel::make_way(self.in_flight() >= CROWD && errand.since.elapsed() < QUICK);
                parting
            }
            Kind::Stream(stream) => {
                kernel::make_way(false);
                stream.run(self, line, errand.client);
                None
            }
            Kind::Models(models) => models.run(self, line, errand.client),
        }
    }

    /// Answers an errand for which there is no worker and no room to wait.
    pub fn overloaded(&self, errand: Errand) {
        let (workers, queue) = (self.config.workers, self.config.queue_size);
        let text = format!("all {workers} workers are busy and the queue of {queue} is full; try again");
        errand.refuse::<()>(ApiError::new(Code::OVERLOADED, text));
    }

    /// The name of the key that the request brings. Errs with 401 and says what is wrong.
    fn authenticate(&self, head: &Head) -> Result<Arc<str>, ApiError> {
        if self.config.api_keys.is_empty() {
            return Ok(Arc::clone(&self.anonymous));
        }
        let Some(given) = head.field("authorization") else { return Err(unauthorized("no key given")) };
        let secret = match given.split_once(' ') {
            Some((scheme, secret)) if scheme.eq_ignore_ascii_case("bearer") => secret.trim_start(),
            _ => given,
        };
        find_key(&self.config.api_keys, secret).ok_or_else(|| unauthorized("wrong key"))
    }

    /// Judges a request by its head: what is known of it, and of how many bytes its body may be, where it is let in.
    pub fn admit(&self, head: &Head) -> (Option<Admitted>, Result<usize, ApiError>) {
        let known = route::route(head.method(), head.path()).and_then(|endpoint| {
            let key = if endpoint.is_public() { Arc::clone(&self.anonymous) } else { self.authenticate(head)? };
            // Counted before the question whether we drain: who drains looks at the count afterwards, so that no request
            // falls between the two.
            Ok(Admitted { endpoint, key, in_flight: Some(InFlight::new(&self.in_flight)) })
        });
        let admitted = match known {
            Ok(admitted) => admitted,
            Err(e) => return (None, Err(e)),
        };
        let asks = admitted.endpoint.takes_question();
        let verdict = if !admitted.endpoint.is_public() && self.draining.load(Ordering::SeqCst) {
            Err(ApiError::shutting_down())
        } else if asks && !is_json(head) {
            Err(ApiError::new(Code::UNSUPPORTED_MEDIA_TYPE, "the body must be JSON: send Content-Type: application/json"))
        } else if asks && head.field("content-encoding").is_some_and(|coding| !coding.eq_ignore_ascii_case("identity")) {
            Err(ApiError::new(Code::UNSUPPORTED_MEDIA_TYPE, "the body must not be compressed: send it without Content-Encoding"))
        } else {
            Ok(if asks { self.config.max_body_bytes } else { NEEDLESS_BODY })
        };
        (Some(admitted), verdict)
    }
}

/// An answer that is left to be sent.
pub struct Parting {
    exit: Exit,
    reply: Reply,
    model: Option<String>,
    _place: Taken,
}

impl Parting {
    /// Sends it, however long the client takes.
    pub fn send(self) {
        self.exit.send::<()>(self.reply, self.model);
    }

    /// Says in the log that it did not go out, where its connection is cut.
    pub fn drop_unsent(self) {
        self.exit.refuse::<()>(ApiError::client_gone());
    }
}

/// The way out of a request: the right to answer it, what every answer of it carries, and its line in
/// the log.
pub struct Exit {
    responder: Responder,
    /// What our own rate limit has to say.
    headers: Vec<Header>,
    entry: Entry,
}

impl Exit {
    /// Sends an answer. Always `None`: nothing is left to do of the request, whatever the caller has for that.
    fn send<T>(self, reply: Reply, model: Option<String>) -> Option<T> {
        self.send_until(None, reply, model);
        None
    }

    /// Sends an answer, which the client has to have taken by then.
    fn send_until(mut self, until: Option<Instant>, mut reply: Reply, model: Option<String>) {
        if self.entry.own_id {
            reply.headers.retain(|(name, _)| name != "x-request-id");
        }
        if let Some((_, id)) = reply.headers.iter().find(|(name, _)| name == "x-request-id") {
            self.entry.id.clone_from(id);
        }
        add_headers(&mut reply.headers, self.headers);
        let gone = self.responder.reason(ApiError::client_gone()).code;
        let bytes = self.responder.send(&reply, until);
        let code = bytes.is_err().then_some(gone);
        self.entry.log(&Done { status: reply.status, bytes: bytes.unwrap_or(0), model, code });
    }

    /// Sends an answer where the client has room for it, else gives it back; where too much is on its way already, its
    /// worker sends it, within the time that a client has for a stream's piece.
    fn send_or_part(self, api: &Api, reply: Reply, model: Option<String>) -> Option<Parting> {
        if self.responder.has_room(reply.body.len()) {
            return self.send(reply, model);
        }
        match api.room_for(&reply) {
            Some(place) => Some(Parting { exit: self, reply, model, _place: place }),
            None => {
                self.send_until(Some(Instant::now() + config::CLIENT_STALL), reply, model);
                None
            }
        }
    }

    /// Sends an error; `None` as above.
    fn refuse<T>(self, e: ApiError) -> Option<T> {
        let e = self.responder.reason(e);
        let (status, code) = (e.code.status(), Some(e.code));
        if e.code == Code::CLIENT_GONE {
            self.entry.log(&Done { status, code, ..Done::default() });
            return None;
        }
        let mut reply = Reply::json(status, e.to_json(&self.entry.id));
        reply.headers.extend(e.retry_after.map(|wait| (Cow::Borrowed("Retry-After"), wait)));
        reply.headers.extend(e.headers);
        add_headers(&mut reply.headers, self.headers);
        let bytes = self.responder.send(&reply, None).unwrap_or(0);
        self.entry.log(&Done { status, bytes, model: None, code });
        None
    }
}

/// A request's line in the log, its place in the metrics and among those in flight.
struct Entry {
    id: String,
    own_id: bool,
    peer: SocketAddr,
    key: Option<Arc<str>>,
    method: String,
    path: String,
    started: Instant,
    route: &'static str,
    metrics: Arc<Metrics>,
    _in_flight: InFlight,
}

impl Entry {
    fn new(api: &Api, call: &mut Call<Admitted>) -> Entry {
        let counted = call.admitted.as_mut().and_then(|admitted| admitted.in_flight.take());
        let head = call.head.as_ref();
        let admitted = call.admitted.as_ref().filter(|admitted| !admitted.endpoint.is_public());
        Entry {
            id: call.id.clone(),
            own_id: call.own_id,
            peer: call.peer,
            key: admitted.map(|admitted| Arc::clone(&admitted.key)),
            method: head.map_or("-", Head::method).to_string(),
            path: head.map_or("-", Head::path).to_string(),
            started: call.started,
            route: call.admitted.as_ref().map_or(Endpoint::NONE, |admitted| admitted.endpoint.name()),
            metrics: Arc::clone(&api.metrics),
            _in_flight: counted.unwrap_or_else(|| InFlight::new(&api.in_flight)),
        }
    }

    fn log(&self, done: &Done) {
        let time = self.started.elapsed();
        self.metrics.request(self.route, done.status, time);
        log::info!(
            "request id={} client={} key={} method={} path={:.200} status={} ms={}.{} bytes={} model={} code={}",
            self.id,
            self.peer,
            self.key.as_deref().unwrap_or("-"),
            self.method,
            self.path,
            done.status,
            time.as_millis(),
            time.subsec_micros() / 100 % 10,
            done.bytes,
            done.model.as_deref().map_or(Cow::Borrowed("-"), one_word),
            done.code.map_or("-", Code::name),
        );
    }
}

/// Counts a request as long as it lives.
struct InFlight(Arc<AtomicUsize>);

impl InFlight {
    fn new(count: &Arc<AtomicUsize>) -> InFlight {
        count.fetch_add(1, Ordering::SeqCst);
        InFlight(Arc::clone(count))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn unauthorized(what: &str) -> ApiError {
    let text = format!("{what}; send Authorization: Bearer KEY with one of the server's API_KEYS");
    ApiError::new(Code::UNAUTHORIZED, text).with_header("WWW-Authenticate", "Bearer")
}

/// Compares with every key, each over the same length, so that time tells nothing about any.
fn find_key(keys: &[ApiKey], secret: &str) -> Option<Arc<str>> {
    // In words of eight bytes, since each comparison costs the same.
    let padded = |text: &str| {
        let mut words = [0_u64; ApiKey::MAX_SECRET / 8];
        for (word, bytes) in words.iter_mut().zip(text.as_bytes().chunks(8)) {
            let mut eight = [0; 8];
            eight[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(eight);
        }
        words
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

/// The body is said to be JSON, or to be nothing. A web page of another site has to say it: only then does its browser
/// ask first whether it may (<https://fetch.spec.whatwg.org/#cors-safelisted-request-header>), and hear that it may not.
fn is_json(head: &Head) -> bool {
    let Some(content_type) = head.field("content-type") else { return head.field("sec-fetch-site") != Some("cross-site") };
    let media_type = media_type(content_type);
    media_type == "application/json" || (media_type.starts_with("application/") && media_type.ends_with("+json"))
}

/// A model's name as one word of a log line.
fn one_word(text: &str) -> Cow<'_, str> {
    if text.len() <= 100 && text.bytes().all(|b| b.is_ascii_graphic()) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().take(100).map(|c| if c.is_alphanumeric() || c.is_ascii_graphic() { c } else { '_' }).collect())
}
