//! Answers as they are written: `POST /api/streaming`, and `POST /v1/chat/completions` with `stream`.

use std::sync::Arc;

use super::{Api, Done, Request, lost, overloaded, refuse};
use crate::error::{ApiError, Header};
use crate::exchange::Question;
use crate::handoff::{Nothing, handoff};
use crate::http::Responder;
use crate::openai::Chat;
use crate::relay::{self, ClientEnd, Draft};
use crate::upstream::Line;

/// `POST /api/streaming`: a question, its answer in pieces.
pub fn stream(api: &Api, request: &Request, responder: Responder, headers: Vec<Header>) -> Done {
    let config = &api.config;
    match Question::parse(request.body, config.max_question_chars) {
        Ok(asked) => {
            let chat = Chat::from_question(asked, &config.model, config.system_prompt.as_deref(), true);
            relay(api, request, responder, headers, chat)
        }
        Err(e) => refuse(responder, e.with_headers(headers), request.id),
    }
}

/// Hands the stream to a worker and breaks the silence until it ends.
pub fn relay(api: &Api, request: &Request, responder: Responder, headers: Vec<Header>, mut chat: Chat) -> Done {
    if let Err(e) = api.store.check() {
        return refuse(responder, e.with_headers(headers), request.id);
    }
    let draft = Draft::new(Arc::clone(request.key), &chat, !chat.added_usage, request.started);
    let client = responder.client();
    let end = Arc::new(ClientEnd::new(responder, request.id.to_string(), headers.clone()));
    let (done, outcome) = handoff();
    let (relayed, store) = (Arc::clone(&end), Arc::clone(&api.store));
    let job = move |line: &mut Line| {
        let _ = done.give(relay::run(line, client, &mut chat, &relayed, &store, draft));
    };
    let outcome = match api.pool.submit(Box::new(job)) {
        Err(_) => Err(overloaded(&api.config)),
        Ok(()) => loop {
            match outcome.take_within(end.silence_left(api.config.stream_heartbeat)) {
                Ok(outcome) => break outcome,
                Err(Nothing::Yet) => end.break_silence(api.config.stream_heartbeat),
                Err(Nothing::Ever) => break Err(lost()),
            }
        },
    };
    let failed = |e: ApiError| match end.unanswered() {
        Some(responder) => refuse(responder, e.with_headers(headers), request.id),
        None => Done { status: 200, bytes: end.abort(), model: None, code: Some(e.code) },
    };
    match outcome {
        Ok(streamed) => Done { status: 200, bytes: streamed.bytes, model: Some(streamed.model), code: streamed.failure },
        Err(e) => failed(e),
    }
}
