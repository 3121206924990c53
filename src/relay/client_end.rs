//! The client's end of a running stream, and the pulse that breaks its silence. Knows the client, not where the events
//! come from.

use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{ApiError, Header, StartError, add_headers, take_id};
use crate::http::{Responder, StreamWriter};
use crate::lock::lock;
use crate::upstream::Hangup;

/// The client's end of a stream, shared by the worker that relays and the pulse that breaks the silence.
pub struct ClientEnd {
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// Ours, for the head of the answer.
    headers: Vec<Header>,
    /// Those of the upstream, for the same.
    passed_on: Vec<Header>,
    /// The request's own, until the head goes out with the upstream's.
    id: String,
    /// `Some`: pass on the upstream's fields, its id only if false.
    upstream_head: Option<bool>,
    last_sent: Instant,
    /// There once a worker has taken the stream.
    hangup: Option<Hangup>,
}

enum Phase {
    /// Nothing went out: a failure can still become a status.
    Unanswered(Responder),
    Open(StreamWriter),
    Over,
}

impl ClientEnd {
    /// The end for a request nobody answered yet; `id` is the request's, for error events, and
    /// `headers` stand in the head of the answer. `upstream_head`: so do fields of the upstream's head, but
    /// for its id where the request's is the client's own (true).
    pub fn new(responder: Responder, id: String, headers: Vec<Header>, upstream_head: Option<bool>) -> ClientEnd {
        ClientEnd {
            state: Mutex::new(State {
                phase: Phase::Unanswered(responder),
                headers,
                passed_on: Vec::new(),
                id,
                upstream_head,
                last_sent: Instant::now(),
                hangup: None,
            }),
        }
    }

    /// Keeps fields of the upstream's head for ours, while that is not out; they replace those of a model that failed before.
    pub(super) fn pass_on(&self, upstream: Vec<Header>) {
        let mut state = lock(&self.state);
        if state.upstream_head.is_some() && matches!(state.phase, Phase::Unanswered(_)) {
            state.passed_on = upstream;
        }
    }

    /// The request's id as the client sees it.
    pub fn id(&self) -> String {
        lock(&self.state).id.clone()
    }

    /// Sends bytes of events, after the 200 where that is not out yet.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.last_sent = Instant::now();
        state.send(bytes)
    }

    /// Sends the last bytes and ends the body of a stream that has begun. Returns the bytes of body sent in all.
    pub(super) fn finish(&self, bytes: &[u8]) -> u64 {
        match std::mem::replace(&mut lock(&self.state).phase, Phase::Over) {
            Phase::Open(writer) => writer.finish(bytes),
            _ => 0,
        }
    }

    /// Gives the request, and what its answer carries, back where nothing of an answer went out.
    pub fn unanswered(&self) -> Option<(Responder, Vec<Header>)> {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut state.phase, Phase::Over) {
            Phase::Unanswered(responder) => Some((responder, std::mem::take(&mut state.headers))),
            other => {
                state.phase = other;
                None
            }
        }
    }

    /// Ends the connection where the stream is still open; returns the bytes of body sent in all.
    pub(super) fn abort(&self) -> u64 {
        match std::mem::replace(&mut lock(&self.state).phase, Phase::Over) {
            Phase::Open(writer) => writer.abort(),
            _ => 0,
        }
    }

    pub(super) fn reason(&self, e: ApiError) -> ApiError {
        match lock(&self.state).responder() {
            Some(responder) => responder.reason(e),
            None => e,
        }
    }

    pub(super) fn is_unanswered(&self) -> bool {
        matches!(lock(&self.state).phase, Phase::Unanswered(_))
    }

    /// Ends an open stream with an error event. Returns the bytes of body sent in all.
    pub fn fail(&self, e: &ApiError) -> u64 {
        let event = format!("data: {}\n\n", e.to_json(&lock(&self.state).id));
        self.finish(event.as_bytes())
    }

    /// Notes what ends the call of the worker that has taken the stream.
    pub(super) fn take_up(&self, hangup: Hangup) {
        lock(&self.state).hangup = Some(hangup);
    }

    /// Sends a comment where nothing was sent for `interval` and the client has room for it; ends the upstream's
    /// call where the client has gone. False: the stream is over.
    fn beat(&self, interval: Duration) -> bool {
        // Whoever holds it is sending.
        let Ok(mut state) = self.state.try_lock() else { return true };
        let Some(responder) = state.responder() else { return false };
        if let (Some(hangup), true) = (&state.hangup, responder.is_client_gone()) {
            hangup();
            return true;
        }
        // Who has not taken what was sent would only keep all others waiting.
        if state.last_sent.elapsed() < interval || !responder.has_room(0) {
            return true;
        }
        state.last_sent = Instant::now();
        if state.send(b": keep-alive\n\n").is_err() {
            state.hangup.iter().for_each(|hangup| hangup());
        }
        true
    }
}

impl State {
    /// What knows the client, until the stream is over.
    fn responder(&self) -> Option<&Responder> {
        match &self.phase {
            Phase::Unanswered(responder) => Some(responder),
            Phase::Open(writer) => Some(writer.responder()),
            Phase::Over => None,
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Unanswered(responder) => {
                let mut headers = std::mem::take(&mut self.passed_on);
                if let (Some(id), Some(false)) = (take_id(&mut headers), self.upstream_head) {
                    self.id = id;
                }
                headers.extend([("Cache-Control".into(), "no-cache".into()), ("X-Accel-Buffering".into(), "no".into())]);
                add_headers(&mut headers, std::mem::take(&mut self.headers));
                let (writer, result) = responder.stream("text/event-stream; charset=utf-8", &self.id, &headers, bytes);
                self.phase = Phase::Open(writer);
                result
            }
            Phase::Open(mut writer) => {
                let result = writer.write(bytes);
                self.phase = Phase::Open(writer);
                result
            }
            Phase::Over => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// The thread that breaks the silence of streams, those that wait for a worker included, and ends those whose client
/// has gone, since their workers wait for the upstream alone.
pub struct Pulse {
    ends: Arc<Mutex<Vec<Weak<ClientEnd>>>>,
}

impl Pulse {
    /// A pulse that lets no stream be silent for longer than `interval`. Errs where there is no thread for it.
    pub fn start(interval: Duration) -> Result<Pulse, StartError> {
        let ends: Arc<Mutex<Vec<Weak<ClientEnd>>>> = Arc::default();
        let beating = Arc::clone(&ends);
        let beat = (interval / 10).min(Duration::from_secs(1));
        let thread = thread::Builder::new().name("pulse".into()).stack_size(128 * 1024).spawn(move || {
            loop {
                let mut kept = std::mem::take(&mut *lock(&beating));
                kept.retain(|end| end.upgrade().is_some_and(|end| end.beat(interval)));
                lock(&beating).append(&mut kept);
                thread::sleep(beat);
            }
        });
        thread.map_err(|e| StartError::machine(format!("no thread for streams' heartbeats: {e}")))?;
        Ok(Pulse { ends })
    }

    /// Takes care of a stream until it is over.
    pub fn keep(&self, end: &Arc<ClientEnd>) {
        lock(&self.ends).push(Arc::downgrade(end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    const SILENCE: Duration = Duration::from_secs(60);

    /// What a client hears of what is done at its end.
    fn heard(act: impl FnOnce(&ClientEnd)) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (server, _) = listener.accept().expect("accepted");
        let end = ClientEnd::new(Responder::on(server), String::new(), Vec::new(), None);
        act(&end);
        drop(end);
        let mut heard = String::new();
        client.read_to_string(&mut heard).expect("text");
        heard
    }

    #[test]
    fn what_is_sent_breaks_the_silence_and_needs_no_heartbeat() {
        let heard = heard(|end| {
            lock(&end.state).last_sent -= SILENCE;
            assert!(end.send(b"data: 1\n\n").is_ok() && end.beat(SILENCE));
        });
        assert!(heard.contains("data: 1") && !heard.contains("keep-alive"), "{heard}");
    }

    #[test]
    fn a_silence_is_broken_when_it_is_that_long_and_then_begins_anew() {
        let heard = heard(|end| {
            assert!(end.beat(SILENCE) && end.is_unanswered(), "it is not that long yet");
            lock(&end.state).last_sent -= SILENCE;
            assert!(end.beat(SILENCE) && end.beat(SILENCE));
        });
        assert_eq!(heard.matches(": keep-alive").count(), 1, "{heard}");
    }

    #[test]
    fn a_client_without_room_gets_no_heartbeat_and_holds_nobody_up() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (mut server, _) = listener.accept().expect("accepted");
        let end = ClientEnd::new(Responder::on(server.try_clone().expect("a copy")), String::new(), Vec::new(), None);
        assert!(end.beat(Duration::ZERO) && !end.is_unanswered(), "who has room gets one");
        server.set_nonblocking(true).expect("nonblocking");
        while server.write(&[0; 4096]).is_ok() {}
        // With a write that waits, and gives up, the stream would be over.
        server.set_nonblocking(false).expect("blocking");
        server.set_write_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        assert!(end.beat(Duration::ZERO) && end.beat(Duration::ZERO), "it is still open");
        drop(client);
    }
}
