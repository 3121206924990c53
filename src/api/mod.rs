//! The service behind the HTTP door: admits, authenticates, answers each request and logs it. Knows
//! the doors through what they offer; HTTP's bytes, ureq and SQL are theirs.
//!
//! A request is answered in two steps: `prepare` does what needs no LLM, on the thread that read the request;
//! what is left, an `Errand`, is run on a worker.

mod ask;
mod exit;
mod history;
mod idempotency;
mod models;
mod pages;
mod places;
mod route;
mod streaming;
mod system;

use std::collections::{BTreeSet, HashMap};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq;

use crate::config::{ApiKey, Config, MAX_SECRET};
use crate::error::{ApiError, Code, StartError, media_type};
use crate::exchange::Question;
use crate::http::{self, Call, Connections, Head, Reply};
use crate::kernel;
use crate::metrics::Metrics;
use crate::openai::Chat;
use crate::pool::Pool;
use crate::rate_limit::RateLimit;
use crate::relay::Pulse;
use crate::store::Store;
use crate::upstream::Line;
use exit::{Done, Entry, Exit, InFlight};
use idempotency::Idempotency;
use places::{Places, Taken};
use route::Endpoint;

pub use exit::Parting;

const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// So many answers are put together out of the history at once: each takes several times its bytes. Half of them for one key,
/// where there are several.
const MOST_MAKING: usize = 8;
/// So many of them may be searches, each of which may take a second: pages and repetitions do not wait behind those.
const MOST_SEARCHING: usize = 4;
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
    idempotency: Arc<Idempotency>,
    /// For pages of history and repetitions that are put together.
    making: Arc<Places>,
    /// Those of them that are searches.
    searching: Arc<Places>,
    /// A key's share of both: for its searches, and for all.
    making_of: HashMap<Arc<str>, [Arc<Places>; 2]>,
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
        let names: BTreeSet<&Arc<str>> = config.api_keys.iter().map(|key| &key.name).collect();
        let share = |most: usize| Places::new(if names.len() > 1 { most / 2 } else { most });
        let shares = |name: &&Arc<str>| (Arc::clone(name), [share(MOST_SEARCHING), share(MOST_MAKING)]);
        Ok(Api {
            pulse: Pulse::start(config.stream_heartbeat)?,
            rate_limit: RateLimit::new(config.rate_limit_per_minute),
            idempotency: Arc::default(),
            making: Places::new(MOST_MAKING),
            searching: Places::new(MOST_SEARCHING),
            making_of: names.iter().map(shares).collect(),
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
            Endpoint::Models => Some(models::prepare(&request, exit)),
            Endpoint::History => match history::history(self, &request) {
                Ok(reply) => self.give(exit, reply, None),
                Err(e) => exit.refuse(e),
            },
            Endpoint::Livez => exit.send(system::livez(), None),
            Endpoint::Readyz => exit.send(system::readyz(self), None),
            Endpoint::Metrics => exit.send(system::metrics(self), None),
            Endpoint::Page => match pages::page(head.path()) {
                Ok(reply) => exit.send(reply, None),
                Err(e) => exit.refuse(e),
            },
        }
    }

    /// A place for an answer to this key that is put together out of the history. Errs with 503 where there is none for long.
    fn make(&self, key: &str, is_search: bool) -> Result<Vec<Taken>, ApiError> {
        let until = Instant::now() + MAKING_PATIENCE;
        // Those of the key come first, so that the others who wait are not many of one key; and those for searches, which wait
        // for each other with nothing that a page needs.
        let own = self.making_of.get(key).into_iter().flatten().skip(if is_search { 0 } else { 1 });
        let places = own.chain(is_search.then_some(&self.searching)).chain([&self.making]);
        let taken = places.map(|places| places.take(1, until.saturating_duration_since(Instant::now())));
        taken
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| ApiError::new(Code::OVERLOADED, "too much is being read from the history; try again"))
    }

    /// Sends an answer that costs nothing to repeat; 503 where too much is on its way to slow clients already.
    fn give(&self, exit: Exit, reply: Reply, model: Option<String>) -> Option<Errand> {
        match self.room_for(&reply) {
            Some(_place) => exit.send(reply, model),
            None => {
                let text = "too many large answers are on their way to slow clients; try again";
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
        } else if asks && is_compressed(head) {
            Err(ApiError::new(Code::UNSUPPORTED_MEDIA_TYPE, "the body must not be compressed: send it without Content-Encoding"))
        } else {
            Ok(if asks { self.config.max_body_bytes } else { NEEDLESS_BODY })
        };
        (Some(admitted), verdict)
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
        let mut words = [0_u64; MAX_SECRET / 8];
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

/// The body is said to be JSON, or to be nothing. A web page has to say it: only then does the browser of one of another
/// origin ask first whether it may (<https://fetch.spec.whatwg.org/#cors-safelisted-request-header>), and hear that not.
fn is_json(head: &Head) -> bool {
    let Some(content_type) = head.field("content-type") else { return head.field("origin").is_none() };
    let media_type = media_type(content_type);
    media_type == "application/json" || (media_type.starts_with("application/") && media_type.ends_with("+json"))
}

/// The body is said to be coded, by whatever means.
fn is_compressed(head: &Head) -> bool {
    head.field("content-encoding").is_some_and(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case("identity"))
}
