//! The way out of a request: the right to answer it, its line in the log, its place in the metrics. Knows endpoints by
//! their names only.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::places::Taken;
use super::route::Endpoint;
use super::{Admitted, Api};
use crate::config;
use crate::error::{ApiError, Code, Header, add_headers, take_id};
use crate::http::{Call, Head, Reply, Responder};
use crate::metrics::Metrics;

/// What became of an answer, for the log.
#[derive(Default)]
pub struct Done {
    pub status: u16,
    pub bytes: u64,
    pub model: Option<String>,
    pub code: Option<Code>,
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
    pub responder: Responder,
    /// What our own rate limit has to say.
    pub headers: Vec<Header>,
    pub entry: Entry,
}

impl Exit {
    /// Sends an answer. Always `None`, of any type, which callers return in turn: nothing is left for a worker.
    pub fn send<T>(self, reply: Reply, model: Option<String>) -> Option<T> {
        self.finish(reply, None, model, None);
        None
    }

    /// Sends an answer, which the client has to have taken `until` then; `code` is an error's.
    fn finish(mut self, mut reply: Reply, until: Option<Instant>, model: Option<String>, code: Option<Code>) {
        // The upstream's own id stands in for ours where its answer is passed on.
        if let (Some(id), false) = (take_id(&mut reply.headers), self.entry.own_id) {
            self.entry.id = id;
        }
        add_headers(&mut reply.headers, self.headers);
        let sent = self.responder.send(&reply, &self.entry.id, until);
        self.entry.log(&Done { status: reply.status, bytes: sent.unwrap_or(0), model, code: code.or(sent.err()) });
    }

    /// Sends an answer where the client has room for it, else gives it back; where too much is on its way already, its
    /// worker sends it, within the time that a client has for a stream's piece.
    pub fn send_or_part(self, api: &Api, reply: Reply, model: Option<String>) -> Option<Parting> {
        if self.responder.has_room(reply.body.len()) {
            return self.send(reply, model);
        }
        match api.room_for(&reply) {
            Some(place) => Some(Parting { exit: self, reply, model, _place: place }),
            None => {
                self.finish(reply, Some(Instant::now() + config::CLIENT_STALL), model, None);
                None
            }
        }
    }

    /// Sends an error; `None` as above.
    pub fn refuse<T>(self, e: ApiError) -> Option<T> {
        let e = self.responder.reason(e);
        let (status, code) = (e.code.status(), Some(e.code));
        if e.code == Code::CLIENT_GONE {
            self.entry.log(&Done { status, code, ..Done::default() });
            return None;
        }
        let mut reply = Reply::json(status, e.to_json(&self.entry.id));
        reply.headers = e.headers;
        self.finish(reply, None, None, code);
        None
    }
}

/// A request's line in the log, its place in the metrics and among those in flight.
pub struct Entry {
    pub id: String,
    pub own_id: bool,
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
    /// The line of a request that came, which counts from now on, or from its head where it was let in by that.
    pub fn new(api: &Api, call: &mut Call<Admitted>) -> Entry {
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

    /// Writes the line, and counts the request by what became of it.
    pub fn log(&self, done: &Done) {
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
pub struct InFlight(Arc<AtomicUsize>);

impl InFlight {
    /// One more of these.
    pub fn new(count: &Arc<AtomicUsize>) -> InFlight {
        count.fetch_add(1, Ordering::SeqCst);
        InFlight(Arc::clone(count))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A model's name as one word of a log line.
fn one_word(text: &str) -> Cow<'_, str> {
    if text.len() <= 100 && text.bytes().all(|b| b.is_ascii_graphic()) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().take(100).map(|c| if c.is_alphanumeric() || c.is_ascii_graphic() { c } else { '_' }).collect())
}
