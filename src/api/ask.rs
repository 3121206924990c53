//! Whole answers, stored before they are given: `POST /api/ask`, and `POST /v1/chat/completions`
//! without `stream`.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use super::idempotency::{First, Part};
use super::route::Endpoint;
use super::{Api, Errand, Exit, Kind, Parting, Request};
use crate::clock;
use crate::error::{ApiError, Header};
use crate::exchange::Pair;
use crate::http::Reply;
use crate::openai::Chat;
use crate::store::{Remembered, Unique};
use crate::upstream::Line;

/// A question on its way to the LLM, and what becomes of the answer.
pub struct Whole {
    chat: Chat,
    key: Arc<str>,
    started: Instant,
    /// Where others with the same `Idempotency-Key` wait: what is to be noted for them.
    first: Option<(First, Unique)>,
    /// The answer goes out as the upstream gave it, not as `/api/ask` shows it.
    as_it_came: bool,
    pub(super) exit: Exit,
}

/// Keeps a chat request that is to be answered as a whole for a worker; answers where it was answered before.
pub fn prepare(api: &Api, request: &Request, exit: Exit, chat: Chat) -> Option<Errand> {
    let first = match api.idempotency.turn(api, request, || exit.responder.is_client_gone()) {
        Ok(None) => None,
        Ok(Some(Part::First(first, unique))) => Some((first, unique)),
        Ok(Some(Part::Again(remembered, place))) => {
            let (body, model) = repetition(*remembered);
            drop(place);
            return api.give(exit, Reply::json(200, body), Some(model));
        }
        Err(e) => return exit.refuse(e),
    };
    if let Err(e) = api.store.check() {
        return exit.refuse(e);
    }
    let key = Arc::clone(request.key);
    let client = exit.responder.client();
    let as_it_came = request.endpoint == Endpoint::ChatCompletions;
    let whole = Whole { chat, key, started: request.started, first, as_it_came, exit };
    Some(Errand::new(client, Kind::Whole(Box::new(whole))))
}

impl Whole {
    /// Asks, stores, answers; returns the answer where the client may be slow to take it.
    // Not inlined: a stream would keep room on its stack for what only this needs.
    #[inline(never)]
    pub fn run(mut self: Box<Whole>, api: &Api, line: &mut Line, client: Arc<TcpStream>) -> Option<Parting> {
        let whole = match line.complete(client, &mut self.chat) {
            Ok(whole) => whole,
            Err(e) => return self.exit.refuse(e),
        };
        let completion = whole.completion;
        if let Some(usage) = &completion.usage {
            api.metrics.tokens(&self.chat.model, usage.prompt_tokens, usage.completion_tokens);
        }
        let pair = Pair {
            id: 0,
            key: self.key,
            question: self.chat.question,
            answer: completion.answer,
            model: completion.model.filter(|model| !model.is_empty()).unwrap_or(self.chat.model),
            finish_reason: completion.finish_reason,
            usage: completion.usage,
            latency_ms: self.started.elapsed().as_millis() as u64,
            created_at: clock::now(),
        };
        let (turn, mut unique) = self.first.unzip();
        if let (Some(unique), true) = (&mut unique, self.as_it_came) {
            unique.response = Some(whole.body.clone());
        }
        let answer = Answer { exit: self.exit, turn, as_it_came: self.as_it_came.then_some((whole.body, whole.headers)) };
        let texts = [&pair.question, &pair.answer, &pair.model].into_iter().chain(&pair.finish_reason);
        let text = texts.map(String::len).sum();
        // Who is alone has nobody to share a commit with, and saves a change of threads.
        let lead = api.in_flight() == 1;
        if answer.exit.responder.takes_at_once(answer.size(text)) {
            // No thread sleeps until the commit: that would cost every request two changes of threads more.
            api.store.append(pair, unique, lead, move |stored| {
                answer.give::<()>(stored, Exit::send);
            });
            return None;
        }
        let send = |exit: Exit, reply, model| exit.send_or_part(api, reply, model);
        answer.give(api.store.keep(pair, unique, lead), send)
    }
}

/// An answer that waits for its commit.
struct Answer {
    exit: Exit,
    turn: Option<First>,
    /// The upstream's own body and header fields, where they are the answer.
    as_it_came: Option<(Vec<u8>, Vec<Header>)>,
}

impl Answer {
    /// About how many bytes it has, with `text` bytes of text in the pair.
    fn size(&self, text: usize) -> usize {
        let Some((body, headers)) = &self.as_it_came else {
            // JSON writes a control character as six bytes.
            return 6 * text;
        };
        body.len() + headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
    }

    /// Answers, with the pair by `send`.
    fn give<T>(self, stored: Result<Pair, ApiError>, send: impl FnOnce(Exit, Reply, Option<String>) -> Option<T>) -> Option<T> {
        // Whoever waited for this request may look now.
        drop(self.turn);
        match stored {
            Ok(mut pair) => {
                let (body, headers) = self.as_it_came.unwrap_or_else(|| (json(&pair), Vec::new()));
                let reply = Reply { headers, ..Reply::json(200, body) };
                let model = std::mem::take(&mut pair.model);
                // The client may be slow to take what it says.
                drop(pair);
                send(self.exit, reply, Some(model))
            }
            Err(e) => self.exit.refuse(e),
        }
    }
}

/// What was answered before, and by which model. The rest goes before a client takes it, who may be slow.
fn repetition(remembered: Remembered) -> (Vec<u8>, String) {
    let body = remembered.response.unwrap_or_else(|| json(&remembered.pair));
    (body, remembered.pair.model)
}

fn json(pair: &Pair) -> Vec<u8> {
    let mut json = Vec::with_capacity(pair.question.len() + pair.answer.len() + 512);
    // Writing to a Vec cannot fail.
    let _ = serde_json::to_writer(&mut json, pair);
    json
}
