//! One running stream: events from the upstream to the client, the answer put together on the way, the
//! pair stored before the stream is called done. Stands on the three doors; knows no endpoint.

mod client_end;

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock;
use crate::config::MAX_ANSWER;
use crate::error::{ApiError, Code};
use crate::exchange::{Pair, Usage};
use crate::json::MOST_PARTS;
use crate::kernel;
use crate::openai::{self, Chat, NoAnswer, ToolCalls};
use crate::store::Store;
use crate::upstream::{Events, Failure, Line, Upstream};

pub use client_end::{ClientEnd, Pulse};

/// The rest of a body after its last event comes at once, or the connection is not worth the wait.
const MOMENT: Duration = Duration::from_millis(20);
/// How long it is waited for where the last event leaves it open whether the answer is complete.
const DOUBT: Duration = Duration::from_secs(1);

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
    end.take_up(line.hangup(&client));
    loop {
        let mut events = match line.stream(Arc::clone(&client), chat) {
            Ok(events) => events,
            Err(e) => return cut_short(e, end, store, draft),
        };
        draft.pair.model.clone_from(&chat.model);
        // What a model before it had said; whatever else it says goes out at once, and then no other is asked.
        draft.pair.usage = None;
        end.pass_on(std::mem::take(&mut events.headers));
        match pump(&mut events, end, &mut draft) {
            Ok(done) => {
                let streamed = complete(&done, end, store, is_alone(), draft);
                if streamed.failure.is_none() {
                    let _ = events.settle(MOMENT);
                }
                return Ok(streamed);
            }
            Err(failure) => {
                drop(events);
                if !(failure.passing && draft.first_event.is_none() && line.fall_back(chat, &failure.error)) {
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
    loop {
        let more = events.next(&mut batch)?;
        let mut closing = None;
        for event in batch.drain(..) {
            let data = event.data();
            let data = data.trim_ascii();
            // Nothing is said by it: some servers keep a connection alive so.
            if data.is_empty() {
                continue;
            }
            if data == b"[DONE]" && !event.is_error {
                closing = Some(Ok([&event.lines[..], b"\n"].concat()));
                break;
            }
            let taken = match event.is_error {
                true => Err(NoAnswer::event(data)),
                false => take_in(data, draft, events.upstream()),
            };
            match taken {
                Ok(true) => {
                    out.extend_from_slice(&event.lines);
                    out.push(b'\n');
                }
                Ok(false) => {}
                Err(no) => {
                    closing = Some(Err(no));
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
        match closing {
            Some(Err(no)) => return Err(events.upstream().no_answer(broken_by(draft), "failed", &no)),
            Some(Ok(done)) if draft.answered => {
                // Some servers say so of what they break off.
                if draft.pair.finish_reason.is_none() {
                    events.settle(DOUBT)?;
                }
                return Ok(done);
            }
            None if more => {}
            _ => break,
        }
    }
    if draft.pair.finish_reason.is_some() && draft.first_event.is_some() && draft.others.values().all(|finished| *finished) {
        return Ok(b"data: [DONE]\n\n".to_vec());
    }
    let what = match draft.first_event {
        Some(_) => "the LLM's stream ended before its answer was complete",
        None => "the LLM's stream ended without any event; if it always does, check OPENAI_BASE_URL",
    };
    Err(events.upstream().failed(broken_by(draft), what).into())
}

/// The code for a stream whose events are at fault: it broke off if it had begun, else it is no answer.
fn broken_by(draft: &Draft) -> Code {
    if draft.first_event.is_some() { Code::UPSTREAM_ERROR } else { Code::UPSTREAM_BAD_ANSWER }
}

/// Adds what an event says to the draft; true when the event goes on to the client.
fn take_in(data: &[u8], draft: &mut Draft, upstream: &Upstream) -> Result<bool, NoAnswer> {
    let chunk = openai::parse_chunk(data)?;
    if draft.pair.answer.len() + chunk.delta.len() + draft.tool_calls.size() + chunk.tool_calls.size() > MAX_ANSWER {
        return Err(NoAnswer::too_large());
    }
    draft.pair.answer.push_str(&chunk.delta);
    draft.tool_calls.add(chunk.tool_calls);
    if let Some(model) = chunk.model.filter(|model| !model.is_empty() && *model != draft.pair.model) {
        draft.pair.model = upstream.redact(&model);
    }
    draft.pair.finish_reason = chunk.finish_reason.map(|reason| upstream.redact(&reason)).or(draft.pair.finish_reason.take());
    for (index, finished) in chunk.others {
        // No model gives more, and an index beyond is not believed.
        if draft.others.len() < MOST_PARTS || draft.others.contains_key(&index) {
            *draft.others.entry(index).or_default() |= finished;
        }
    }
    draft.pair.usage = chunk.usage.or(draft.pair.usage);
    draft.answered |= chunk.has_choice;
    Ok(draft.wants_usage || chunk.has_choice || !chunk.has_usage)
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
    let is_unanswered = end.is_unanswered();
    if is_unanswered {
        if !gone {
            return Err(e);
        }
        // What is no stream for the metrics has used no tokens.
        draft.pair.usage = None;
    }
    let reason = if matches!(e.code, Code::CLIENT_GONE | Code::SHUTTING_DOWN) { e.code } else { Code::UPSTREAM_ERROR };
    draft.pair.finish_reason = Some(reason.name().to_string());
    let streamed = draft.streamed();
    if let Err(e) = store.keep_together(draft.into_pair()) {
        log::warn!("a stream that was cut short is not in the history: {}", e.message);
    }
    if gone {
        return if is_unanswered { Err(e) } else { Ok(Streamed { bytes: end.abort(), failure: Some(e.code), ..streamed }) };
    }
    Ok(fail(&e, end, streamed))
}

fn fail(e: &ApiError, end: &ClientEnd, streamed: Streamed) -> Streamed {
    Streamed { bytes: end.fail(e), failure: Some(e.code), ..streamed }
}
