//! One running stream: events from the upstream to the client, the answer put together on the way, the
//! pair stored before the stream is called done. Stands on the three doors; knows no endpoint.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::clock;
use crate::config::MAX_ANSWER;
use crate::error::{ApiError, Code, Header, StartError, add_headers};
use crate::exchange::{Pair, Usage};
use crate::http::{Responder, StreamWriter};
use crate::json::MOST_PARTS;
use crate::kernel;
use crate::lock::lock;
use crate::openai::{self, Chat, NoAnswer, ToolCalls};
use crate::store::Store;
use crate::upstream::{Events, Failure, Hangup, Line};

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
    /// The request's own id.
    id: String,
    /// The head takes in fields of the upstream's; true: but for its id.
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
    fn pass_on(&self, mut upstream: Vec<Header>) {
        let mut state = lock(&self.state);
        let (Phase::Unanswered(_), Some(own_id)) = (&state.phase, state.upstream_head) else { return };
        upstream.retain(|(name, _)| !own_id || name != "x-request-id");
        state.passed_on = upstream;
    }

    /// The request's id as the client sees it.
    pub fn id(&self) -> String {
        lock(&self.state).id().to_string()
    }

    /// Sends bytes of events, after the 200 where that is not out yet.
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.last_sent = Instant::now();
        state.send(bytes)
    }

    /// Sends the last bytes and ends the body. Returns the bytes of body sent in all.
    fn finish(&self, bytes: &[u8]) -> u64 {
        let mut state = lock(&self.state);
        if matches!(state.phase, Phase::Unanswered(_)) {
            // Where that fails, so does what follows.
            let _ = state.send(b"");
        }
        match std::mem::replace(&mut state.phase, Phase::Over) {
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
    fn abort(&self) -> u64 {
        match std::mem::replace(&mut lock(&self.state).phase, Phase::Over) {
            Phase::Open(writer) => writer.abort(),
            _ => 0,
        }
    }

    fn reason(&self, e: ApiError) -> ApiError {
        match lock(&self.state).responder() {
            Some(responder) => responder.reason(e),
            None => e,
        }
    }

    fn is_unanswered(&self) -> bool {
        matches!(lock(&self.state).phase, Phase::Unanswered(_))
    }

    /// Ends an open stream with an error event. Returns the bytes of body sent in all.
    pub fn fail(&self, e: &ApiError) -> u64 {
        let event = format!("data: {}\n\n", e.to_json(lock(&self.state).id()));
        self.finish(event.as_bytes())
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
        if state.send(b": keep-alive\n\n").is_ok() {
            return true;
        }
        state.hangup.iter().for_each(|hangup| hangup());
        drop(state);
        self.abort();
        false
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

impl State {
    /// What knows the client, until the stream is over.
    fn responder(&self) -> Option<&Responder> {
        match &self.phase {
            Phase::Unanswered(responder) => Some(responder),
            Phase::Open(writer) => Some(writer.responder()),
            Phase::Over => None,
        }
    }

    fn id(&self) -> &str {
        self.passed_on.iter().find(|(name, _)| name == "x-request-id").map_or(&self.id, |(_, id)| id)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Unanswered(responder) => {
                let mut headers = self.passed_on.clone();
                headers.extend([("Cache-Control".into(), "no-cache".into()), ("X-Accel-Buffering".into(), "no".into())]);
                add_headers(&mut headers, std::mem::take(&mut self.headers));
                let (writer, result) = responder.stream("text/event-stream; charset=utf-8", &headers, bytes);
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

/// The pair as it grows.
pub struct Draft {
    /// Its model is what was asked for, until the upstream says which one answers.
    pair: Pair,
    started: Instant,
    /// The client asked for the usage chunk.
    wants_usage: bool,
    tool_calls: ToolCalls,
    /// There was something of an answer.
    answered: bool,
    /// Further choices, and whether each is finished.
    others: BTreeMap<u64, bool>,
    first_event: Option<Duration>,
}

impl Draft {
    /// A pair without an answer yet, which takes the question out of the chat; `started` is when the request came.
    pub fn new(key: Arc<str>, chat: &mut Chat, started: Instant) -> Draft {
        let question = std::mem::take(&mut chat.question);
        let pair = Pair { key, question, model: chat.model.clone(), ..Pair::default() };
        Draft {
            pair,
            started,
            wants_usage: !chat.added_usage,
            tool_calls: ToolCalls::default(),
            answered: false,
            others: BTreeMap::new(),
            first_event: None,
        }
    }

    /// What there is to say of the stream, but for its end.
    fn streamed(&self) -> Streamed {
        let Pair { model, usage, .. } = &self.pair;
        Streamed { bytes: 0, model: model.clone(), usage: *usage, first_event: self.first_event, failure: None }
    }

    fn into_pair(mut self) -> Pair {
        self.tool_calls.append_to(&mut self.pair.answer);
        self.pair.latency_ms = self.started.elapsed().as_millis() as u64;
        self.pair.created_at = clock::now();
        self.pair
    }
}

/// What became of a stream whose 200 went out.
pub struct Streamed {
    pub bytes: u64,
    pub model: String,
    pub usage: Option<Usage>,
    /// From the request to the first event that went out.
    pub first_event: Option<Duration>,
    /// Why it was cut short, where it was.
    pub failure: Option<Code>,
}

/// Asks the upstream and relays its events until the answer is complete or cannot become so. Errs
/// where nothing went out, so that the error can be the answer. `is_alone`: nobody else has a question.
pub fn run(
    line: &mut Line,
    client: Arc<TcpStream>,
    chat: &mut Chat,
    end: &ClientEnd,
    store: &Store,
    is_alone: impl Fn() -> bool,
    mut draft: Box<Draft>,
) -> Result<Streamed, ApiError> {
    line.begin();
    lock(&end.state).hangup = Some(line.hangup(&client));
    loop {
        let mut events = match line.stream(Arc::clone(&client), chat) {
            Ok(events) => events,
            Err(e) => return cut_short(e, end, store, draft),
        };
        draft.pair.model.clone_from(&chat.model);
        // What a model before it had said.
        (draft.pair.usage, draft.pair.finish_reason, draft.answered) = (None, None, false);
        draft.others.clear();
        end.pass_on(std::mem::take(&mut events.headers));
        match pump(&mut events, end, &mut draft) {
            Ok(done) => {
                let streamed = complete(&done, end, store, is_alone(), draft);
                if streamed.failure.is_none() {
                    events.settle();
                }
                return Ok(streamed);
            }
            Err(failure) => {
                drop(events);
                if !(failure.passing && draft.first_event.is_none() && line.fall_back(chat)) {
                    return cut_short(line.give_up(failure.error), end, store, draft);
                }
            }
        }
    }
}

/// Passes events on until the answer is complete; returns the closing event.
fn pump(events: &mut Events, end: &ClientEnd, draft: &mut Draft) -> Result<Vec<u8>, Box<Failure>> {
    let mut batch = Vec::new();
    let mut out = Vec::new();
    let mut began = false;
    loop {
        let more = events.next(&mut batch)?;
        let mut done = None;
        let mut failure = None;
        for event in batch.drain(..) {
            let data = event.data();
            let data = data.trim_ascii();
            // Nothing is said by it: some servers keep a connection alive so.
            if data.is_empty() {
                continue;
            }
            if data == b"[DONE]" {
                done = Some([&event.lines[..], b"\n"].concat());
                break;
            }
            match take_in(data, draft, events) {
                Ok(true) => {
                    began = true;
                    out.extend_from_slice(&event.lines);
                    out.push(b'\n');
                }
                Ok(false) => {}
                Err(no) => {
                    failure = Some(events.no_answer(broken_by(began), "failed", &no));
                    break;
                }
            }
        }
        if !out.is_empty() {
            end.send(&out).map_err(|_| ApiError::client_gone())?;
            out.clear();
            if draft.first_event.is_none() {
                draft.first_event = Some(draft.started.elapsed());
                kernel::forget_unused_stack();
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        let over = !more || done.is_some();
        if let Some(done) = done.filter(|_| draft.answered) {
            return Ok(done);
        }
        if over {
            return match draft.pair.finish_reason {
                Some(_) if began && draft.others.values().all(|finished| *finished) => Ok(b"data: [DONE]\n\n".to_vec()),
                _ => {
                    let text = "the LLM's stream ended before its answer was complete";
                    Err(events.failed(broken_by(began), text).into())
                }
            };
        }
    }
}

/// What a stream that fails by what came of it is: one that broke off, where it had begun, or no answer.
fn broken_by(began: bool) -> Code {
    if began { Code::UPSTREAM_ERROR } else { Code::UPSTREAM_BAD_ANSWER }
}

/// Adds what an event says to the draft; true when the event goes on to the client.
fn take_in(data: &[u8], draft: &mut Draft, events: &Events) -> Result<bool, NoAnswer> {
    let chunk = openai::parse_chunk(data)?;
    if draft.pair.answer.len() + chunk.delta.len() + draft.tool_calls.size() + chunk.tool_calls.size() > MAX_ANSWER {
        return Err(NoAnswer::too_large());
    }
    draft.pair.answer.push_str(&chunk.delta);
    draft.tool_calls.add(chunk.tool_calls);
    if let Some(model) = chunk.model.filter(|model| !model.is_empty() && *model != draft.pair.model) {
        draft.pair.model = events.redact(&model);
    }
    draft.pair.finish_reason = chunk.finish_reason.map(|reason| events.redact(&reason)).or(draft.pair.finish_reason.take());
    for (index, finished) in chunk.others {
        // No model gives more, and an index beyond is not believed.
        if draft.others.len() < MOST_PARTS || draft.others.contains_key(&index) {
            *draft.others.entry(index).or_default() |= finished;
        }
    }
    draft.pair.usage = chunk.usage.or(draft.pair.usage);
    draft.answered |= chunk.has_choice;
    Ok(draft.wants_usage || chunk.has_choice || chunk.usage.is_none())
}

// What comes after the last event is not inlined: each stream waits with every page of stack that was used.

/// Stores the pair and ends the stream with its closing event.
#[inline(never)]
fn complete(done: &[u8], end: &ClientEnd, store: &Store, is_alone: bool, draft: Box<Draft>) -> Streamed {
    let streamed = draft.streamed();
    let stored = match is_alone {
        true => store.keep(draft.into_pair(), None, true),
        false => store.keep_together(draft.into_pair()),
    };
    match stored {
        // Where the client left in this very moment, its answer is complete all the same.
        Ok(_) => Streamed { bytes: end.finish(done), ..streamed },
        Err(e) => fail(&e, end, streamed),
    }
}

/// Ends a stream that did not come to its end; what had arrived is kept.
#[inline(never)]
fn cut_short(e: ApiError, end: &ClientEnd, store: &Store, mut draft: Box<Draft>) -> Result<Streamed, ApiError> {
    let e = end.reason(e);
    let gone = e.code == Code::CLIENT_GONE;
    if end.is_unanswered() && !gone {
        return Err(e);
    }
    let reason = if matches!(e.code, Code::CLIENT_GONE | Code::SHUTTING_DOWN) { e.code } else { Code::UPSTREAM_ERROR };
    draft.pair.finish_reason = Some(reason.name().to_string());
    let streamed = draft.streamed();
    if let Err(e) = store.keep_together(draft.into_pair()) {
        log::warn!("a stream that was cut short is not in the history: {}", e.message);
    }
    if gone {
        return if end.is_unanswered() { Err(e) } else { Ok(Streamed { bytes: end.abort(), failure: Some(e.code), ..streamed }) };
    }
    Ok(fail(&e, end, streamed))
}

fn fail(e: &ApiError, end: &ClientEnd, streamed: Streamed) -> Streamed {
    Streamed { bytes: end.fail(e), failure: Some(e.code), ..streamed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

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
