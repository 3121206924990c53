//! The door to the LLM, and the only place that names ureq: whole answers and streams, with time
//! limits, retries, and the upstream's failures translated into ours. Mocks the LLM where there is
//! none. Knows neither clients' HTTP nor the history.

mod buffers;
mod events;
mod failure;
mod names;
mod tls;
mod watch;
mod wire;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::Read;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::http::{self, HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use ureq::unversioned::transport::Connector;
use ureq::{Agent, Body};

use crate::config::{self, Config, Mode};
use crate::error::{ApiError, Code, Header, StartError, is_sane_id};
use crate::metrics::Metrics;
use crate::mock;
use crate::openai::{self, Chat, Completion, NoAnswer};
use events::Mocked;
use names::Names;
use tls::Tls;
use watch::Watch;
use wire::{NoResolver, WireConnector};

pub use events::Events;
pub use failure::Failure;

/// Characters of a message that repeats the upstream's words.
const MAX_WORDS: usize = 1200;
/// How long the rest of an error answer is waited for.
const WORDS_PATIENCE: Duration = Duration::from_secs(2);
/// A connection that had died before it was used says so within this time.
const DEATH_NOTICE: Duration = Duration::from_secs(1);
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LONGEST_BACKOFF: Duration = Duration::from_secs(8);

fn no_model() -> ApiError {
    ApiError::new(Code::NOT_FOUND, "there is no model of this name; GET /v1/models lists them")
}

/// What is shorter stands in too many words to be taken out of them.
const SHORTEST_SECRET: usize = 4;

/// Whether a key is what servers are given that want none: `none`, `ollama`. It is no secret, and in other words
/// (`latest` for `test`) it would be missed.
fn is_only_a_word(key: &str) -> bool {
    key.len() < 8 && key.bytes().all(|b| b.is_ascii_alphabetic())
}

/// How the LLM is reached; shared by all workers.
pub struct Upstream {
    config: Arc<Config>,
    /// All of a chat request but its body.
    request: http::request::Parts,
    /// What no message may repeat.
    secrets: Vec<String>,
    names: Names,
    tls: Tls,
    metrics: Arc<Metrics>,
}

impl Upstream {
    /// Errs where the base URL or the key cannot stand in a request, or the file of trusted certificates cannot be used.
    pub fn new(config: Arc<Config>, metrics: Arc<Metrics>) -> Result<Upstream, StartError> {
        let url = format!("{}/chat/completions", config.upstream.base);
        let uri: Uri = url.parse().map_err(|e| StartError::usage(format!("OPENAI_BASE_URL: {url:?} is not a URL: {e}")))?;
        let (mut request, ()) = Request::new(()).into_parts();
        request.method = Method::POST;
        request.uri = uri;
        let mut key = HeaderValue::try_from(format!("Bearer {}", config.openai_api_key))
            .map_err(|_| StartError::usage("OPENAI_API_KEY: the value given (not shown) cannot stand in a header"))?;
        key.set_sensitive(true);
        request.headers.insert(header::AUTHORIZATION, key);
        request.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, value) in [("http-referer", &config.openrouter_referer), ("x-openrouter-title", &config.openrouter_title)] {
            if let (false, Ok(value)) = (value.is_empty(), HeaderValue::try_from(value)) {
                request.headers.insert(name, value);
            }
        }
        let mut secrets = vec![config.openai_api_key.clone()];
        secrets.retain(|key| !is_only_a_word(key));
        if let Some(credentials) = &config.upstream.credentials {
            secrets.push(credentials.clone());
            secrets.extend(credentials.split_once(':').map(|(_, password)| password.to_string()));
        }
        secrets.retain(|secret| secret.len() >= SHORTEST_SECRET);
        let tls = Tls::new(config.upstream_ca_file.as_deref())?;
        Ok(Upstream { config, request, secrets, names: Names::default(), tls, metrics })
    }

    /// For one line, whose calls this watch sees to.
    fn agent(&self, watch: &Watch) -> Agent {
        let config = ureq::config::Config::builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent(concat!("ai-proxy/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .tls_config(self.tls.config.clone())
            .input_buffer_size(tls::PIECE)
            .output_buffer_size(tls::PIECE)
            .max_response_header_size(64 * 1024)
            .max_idle_connections(1)
            .max_idle_connections_per_host(1)
            .max_idle_age(config::UPSTREAM_KEEP_ALIVE)
            .build();
        let connector = WireConnector { watch: watch.clone(), names: self.names.clone() };
        Agent::with_parts(config, connector.chain(self.tls.clone()), NoResolver)
    }

    fn has_secret(&self, text: &str) -> bool {
        self.secrets.iter().any(|secret| text.contains(secret))
    }

    /// A word or more of the upstream's, without secrets, for people, log and history.
    pub fn redact(&self, text: &str) -> String {
        let mut text = text.to_string();
        if self.has_secret(&text) {
            text = self.secrets.iter().fold(text, |text, secret| text.replace(secret, "***"));
        }
        // Shortened after that: a part of a secret gives it away, too.
        if let Some((end, _)) = text.char_indices().nth(MAX_WORDS) {
            text.truncate(end);
        }
        text
    }

    /// What the LLM did, in our own words, without secrets.
    pub fn failed(&self, code: Code, what: &str) -> ApiError {
        let what = self.redact(what);
        ApiError { cause: Some(what.as_str().into()), ..ApiError::new(code, what) }
    }

    /// The same, and what it says, where it says anything.
    fn failed_saying(&self, code: Code, what: &str, words: &str) -> ApiError {
        let e = self.failed(code, what);
        if words.is_empty() { e } else { ApiError { message: self.redact(&format!("{what}: {words}")).into(), ..e } }
    }

    /// What came is no answer; `what` the LLM did.
    pub fn no_answer(&self, code: Code, what: &str, no: &NoAnswer) -> Box<Failure> {
        let mut error = self.failed_saying(code, &format!("the LLM {what}: {}", no.why), &no.words);
        if no.refused {
            error = error.pointless_to_retry();
        }
        Box::new(Failure { passing: no.passing, ..error.into() })
    }

    /// The fields of the upstream's head that mean something to its clients, where their values are sane.
    fn passed_on(&self, headers: &HeaderMap) -> Vec<Header> {
        // Of one that is there twice, the first.
        let fields = headers.keys().filter_map(|name| {
            let value = headers.get(name)?.to_str().ok().filter(|value| !self.has_secret(value))?;
            // Names come in small letters.
            let has_secret = self.secrets.iter().any(|secret| name.as_str().contains(&secret.to_ascii_lowercase()));
            let wanted = match name.as_str() {
                "x-request-id" => is_sane_id(value),
                "openai-processing-ms" => value.len() <= 64,
                name => name.starts_with("x-ratelimit-") && value.len() <= 64,
            };
            (wanted && !has_secret).then(|| (name.as_str().to_string().into(), value.to_string()))
        });
        fields.collect()
    }
}

/// A whole answer.
pub struct Answered {
    /// The answer's bytes as they came.
    pub body: Vec<u8>,
    pub completion: Completion,
    /// Fields of its head that clients understand.
    pub headers: Vec<Header>,
}

/// One worker's line to the LLM: at most one connection, kept while it is used.
pub struct Line {
    upstream: Arc<Upstream>,
    agent: Agent,
    watch: Watch,
    /// When the question under way has to have its answer.
    deadline: Instant,
    /// It was sent again after a failure.
    has_retried: bool,
    /// How the upstream calls it in its own logs, as far as it said.
    its_id: Option<String>,
    /// An idle connection occupies a thread of the server's.
    is_costly: bool,
}

impl Line {
    /// A line without a connection yet.
    pub fn new(upstream: &Arc<Upstream>) -> Line {
        let watch = Watch::default();
        let agent = upstream.agent(&watch);
        Line {
            upstream: Arc::clone(upstream),
            agent,
            watch,
            deadline: Instant::now(),
            has_retried: false,
            its_id: None,
            is_costly: false,
        }
    }

    /// What another thread calls to end the stream that this client has left, where it is under way: the worker, which
    /// waits for the upstream alone, gets `client_gone`.
    pub fn hangup(&self, client: &Arc<TcpStream>) -> Hangup {
        let (watch, client) = (self.watch.clone(), Arc::clone(client));
        Box::new(move || watch.client_left(&client))
    }

    /// Sends a chat request and reads the whole answer, all within the upstream timeout; tries the
    /// fallback models where that may help, and then `chat` says so. `client` is watched: when it goes, so
    /// does the call, with `client_gone`.
    pub fn complete(&mut self, client: Arc<TcpStream>, chat: &mut Chat) -> Result<Answered, ApiError> {
        self.ask(client, |line| line.completion(chat))
    }

    /// Does `work` for a client, as a question with its time and its place in the books.
    fn ask<T>(&mut self, client: Arc<TcpStream>, work: impl FnOnce(&mut Line) -> Result<T, ApiError>) -> Result<T, ApiError> {
        self.begin();
        self.watch.begin(client, self.deadline);
        let result = work(self);
        self.end();
        result.map_err(|e| self.give_up(e))
    }

    fn completion(&mut self, chat: &mut Chat) -> Result<Answered, ApiError> {
        loop {
            let response = self.call(chat)?;
            let headers = self.hear(response.headers());
            let body = self.body(response)?;
            match openai::parse_completion(&body) {
                Ok(mut completion) => {
                    completion.model = completion.model.map(|model| self.upstream.redact(&model));
                    completion.finish_reason = completion.finish_reason.map(|reason| self.upstream.redact(&reason));
                    return Ok(Answered { body, completion, headers });
                }
                Err(no) => {
                    let failure = self.upstream.no_answer(Code::UPSTREAM_BAD_ANSWER, "gave no answer", &no);
                    if !(failure.passing && self.fall_back(chat, &failure.error)) {
                        return Err(failure.error);
                    }
                }
            }
        }
    }

    /// Begins with a new question, whose time runs from now on.
    pub fn begin(&mut self) {
        self.deadline = Instant::now() + self.upstream.config.upstream_timeout;
        self.has_retried = false;
    }

    /// Lets go of the client, and of a connection that is better not kept.
    fn end(&mut self) {
        self.watch.end();
        self.spare();
    }

    /// Closes the connection where it is better not kept.
    fn spare(&mut self) {
        if std::mem::take(&mut self.is_costly) {
            self.close();
        }
    }

    fn close(&mut self) {
        self.agent = self.upstream.agent(&self.watch);
    }

    /// Counts a question as failed, and says in the log what the upstream did. Returns its error, which tells clients not to
    /// try again where that would multiply our own attempts.
    // Not inlined: a stream would keep room on its stack for what only this needs.
    #[inline(never)]
    pub fn give_up(&mut self, e: ApiError) -> ApiError {
        self.tell(&e);
        self.upstream.metrics.upstream_error(e.code);
        if self.has_retried { e.pointless_to_retry() } else { e }
    }

    /// Notes how the upstream calls the question; returns the fields of its answer's head that mean something to clients.
    fn hear(&mut self, headers: &HeaderMap) -> Vec<Header> {
        let fields = self.upstream.passed_on(headers);
        self.its_id = fields.iter().find(|(name, _)| name == "x-request-id").map(|(_, id)| id.clone());
        fields
    }

    /// Says in the log what the upstream did. A connection over which came what is no answer is closed: that may be the
    /// answer to something else, and the true one still come.
    fn tell(&mut self, e: &ApiError) {
        if e.code == Code::UPSTREAM_BAD_ANSWER {
            self.close();
        }
        let Some(cause) = &e.cause else { return };
        let its_id = self.its_id.as_ref().map(|id| format!(", its request {id}"));
        log::warn!("{cause}{}", its_id.unwrap_or_default());
    }

    /// Turns to the next fallback model after this failure, where there is one and time for it.
    #[inline(never)]
    pub fn fall_back(&mut self, chat: &mut Chat, e: &ApiError) -> bool {
        let falls_back = Instant::now() < self.deadline && chat.fall_back(&self.upstream.config.fallback_models);
        if falls_back {
            self.upstream.metrics.upstream_fallbacks.inc();
            self.tell(e);
            log::warn!("fallback model {:.100?} is asked next, after {}", chat.model, e.code.name());
        }
        falls_back
    }

    /// The list of models, or the one whose name stands in `path` (`/NAME`), as JSON, and the fields of its head that
    /// clients understand.
    pub fn models(&mut self, client: Arc<TcpStream>, path: &str) -> Result<(Vec<u8>, Vec<Header>), ApiError> {
        self.ask(client, |line| match line.ask_for_models(path) {
            Err(failure) if failure.unknown_model && !path.is_empty() => line.model_of_list(path),
            result => result.map_err(|failure| failure.error),
        })
    }

    fn ask_for_models(&mut self, path: &str) -> Result<(Vec<u8>, Vec<Header>), Box<Failure>> {
        if self.upstream.config.mode != Mode::Upstream {
            return match path {
                "" => Ok((mock::models(&self.upstream.config.models()).into_bytes(), Vec::new())),
                _ => Err(Box::new(Failure { unknown_model: true, ..no_model().into() })),
            };
        }
        let mut request = self.upstream.request.clone();
        request.method = Method::GET;
        request.headers.remove(header::CONTENT_TYPE);
        let url = format!("{}/models{path}", self.upstream.config.upstream.base);
        request.uri = url.parse().map_err(|_| no_model())?;
        let answer = self.attempts(&request, b"")?;
        let headers = self.hear(answer.headers());
        let body = self.body(answer)?;
        openai::check_models(&body).map_err(|no| self.upstream.no_answer(Code::UPSTREAM_BAD_ANSWER, "gave no models", &no))?;
        Ok((body, headers))
    }

    /// The same of the list: some servers, such as llama.cpp's and the mock, have nothing else.
    fn model_of_list(&mut self, path: &str) -> Result<(Vec<u8>, Vec<Header>), ApiError> {
        // Where there is no list either, there is no such model.
        let unlisted = |failure: Box<Failure>| if failure.unknown_model { no_model() } else { failure.error };
        let (list, headers) = self.ask_for_models("").map_err(unlisted)?;
        let name = path.strip_prefix('/').and_then(openai::model_in_path);
        let model = name.and_then(|name| openai::model_of_list(&list, &name));
        model.map(|model| (model, headers)).ok_or_else(no_model)
    }

    fn think(&self, time: Duration) -> Result<(), ApiError> {
        self.watch.sleep(time).map_err(|ended| self.upstream.ended(ended))
    }

    /// The head of a successful answer, from the model asked for or the first fallback that gives one.
    fn call(&mut self, chat: &mut Chat) -> Result<Response<Body>, ApiError> {
        let upstream = Arc::clone(&self.upstream);
        if upstream.config.mode != Mode::Upstream {
            let delay = upstream.config.mock_delay;
            self.think(delay)?;
            return Ok(Response::new(match chat.stream {
                true => Body::builder().reader(Mocked::new(mock::chunks(&chat.body), delay, &self.watch)),
                false => Body::builder().data(mock::completion(&chat.body)),
            }));
        }
        loop {
            let failure = match self.attempts(&upstream.request, &chat.body) {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            if failure.refuses_usage && chat.drop_usage() {
                continue;
            }
            if !(failure.passing || failure.unknown_model) || !self.fall_back(chat, &failure.error) {
                return Err(failure.error);
            }
        }
    }

    /// The head of a successful answer, after as many attempts as are allowed and fit the time.
    fn attempts(&mut self, request: &http::request::Parts, body: &[u8]) -> Result<Response<Body>, Box<Failure>> {
        let mut retries = 0;
        loop {
            self.watch.note_reuse(false);
            self.its_id = None;
            self.upstream.metrics.upstream_attempts.inc();
            let began = Instant::now();
            let attempt = match request.method {
                Method::GET => self.agent.run(Request::from_parts(request.clone(), ())),
                _ => self.agent.run(Request::from_parts(request.clone(), body)),
            };
            // Over TLS a new connection costs more.
            let is_plain = request.uri.scheme_str() == Some("http");
            self.is_costly = is_plain && attempt.as_ref().is_ok_and(counts_requests);
            // A kept connection may have died while nobody looked; that costs nobody an attempt. Who dies later has taken the
            // question, and may have been paid for it.
            let is_dead = match &attempt {
                Ok(response) => is_farewell(response),
                Err(e) => matches!(e, ureq::Error::Io(_)) && self.watch.ended().is_none(),
            };
            if is_dead && self.watch.reused() && began.elapsed() < DEATH_NOTICE {
                self.close();
                continue;
            }
            let failure = match attempt {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => self.refused(response),
                Err(e) => match self.watch.ended() {
                    Some(ended) => self.upstream.ended(ended).into(),
                    None => self.upstream.unanswered(&e),
                },
            };
            let wait = failure.wait.filter(|wait| !wait.is_zero()).unwrap_or_else(|| backoff(retries));
            // What asks for more than there is of time is later than any end.
            let too_late = Instant::now().checked_add(wait).is_none_or(|then| then >= self.deadline);
            if !failure.passing || too_late || retries == self.upstream.config.upstream_retries {
                return Err(failure);
            }
            retries += 1;
            self.has_retried = true;
            self.upstream.metrics.upstream_retries.inc();
            log::debug!("attempt {retries} failed, next in {wait:?}: {}", failure.error.cause.as_deref().unwrap_or_default());
            self.spare();
            self.think(wait)?;
        }
    }

    /// An answer that refuses the question. Its words are not waited for as an answer is: a retry or another model may help.
    fn refused(&mut self, response: Response<Body>) -> Box<Failure> {
        let fields = self.hear(response.headers());
        self.watch.bound(self.deadline.min(Instant::now() + WORDS_PATIENCE));
        let failure = self.upstream.refused(response, fields);
        self.watch.bound(self.deadline);
        match self.watch.ended() {
            Some(ended) => self.upstream.ended(ended).into(),
            None => failure,
        }
    }

    fn body(&self, response: Response<Body>) -> Result<Vec<u8>, ApiError> {
        // As much as it says: a guess would keep 8 KiB a worker.
        let length = response.body().content_length().unwrap_or(0).min(64 * 1024);
        self.whole(response.into_body().into_reader(), Vec::with_capacity(length as usize + 1))
    }

    /// A body to its end, which may have begun.
    fn whole(&self, reader: impl Read, mut body: Vec<u8>) -> Result<Vec<u8>, ApiError> {
        let result = reader.take((config::MAX_ANSWER + 1 - body.len()) as u64).read_to_end(&mut body);
        if body.len() > config::MAX_ANSWER {
            let text = format!("the LLM's answer is larger than {} bytes", config::MAX_ANSWER);
            return Err(self.upstream.failed(Code::UPSTREAM_BAD_ANSWER, &text));
        }
        match result {
            Ok(_) => Ok(body),
            Err(e) => Err(match self.watch.ended() {
                Some(ended) => self.upstream.ended(ended),
                None => self.upstream.failed(Code::UPSTREAM_BAD_ANSWER, &format!("the LLM's answer broke off: {e}")),
            }),
        }
    }
}

/// Ends a client's stream from another thread.
pub type Hangup = Box<dyn Fn() + Send>;

/// What an upstream says that closes an idle connection, which may cross our question on its way (RFC 9110, section 15.5.9).
fn is_farewell(response: &Response<Body>) -> bool {
    let closes = response.headers().get(header::CONNECTION).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"));
    response.status() == StatusCode::REQUEST_TIMEOUT && closes
}

/// `Keep-Alive: max=` is sent by servers with a thread for each connection, such as llama.cpp's: an idle connection
/// there keeps somebody waiting.
fn counts_requests(response: &Response<Body>) -> bool {
    let says = response.headers().get("keep-alive").and_then(|value| value.to_str().ok());
    says.is_some_and(|says| says.split(',').any(|says| says.trim_ascii_start().starts_with("max=")))
}

/// Exponential, shortened by up to half at random, so that many clients' retries do not meet.
fn backoff(retries: u32) -> Duration {
    let most = FIRST_BACKOFF.saturating_mul(1 << retries.min(10)).min(LONGEST_BACKOFF);
    // The standard library's only source of randomness.
    let random = RandomState::new().build_hasher().finish();
    most.mul_f64(0.5 + 0.5 * (random as f64 / u64::MAX as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_and_stays_bounded() {
        for retries in 0..40 {
            let most = FIRST_BACKOFF.saturating_mul(1 << retries.min(10)).min(LONGEST_BACKOFF);
            assert!(backoff(retries) <= most && backoff(retries) >= most / 2);
        }
    }
}
