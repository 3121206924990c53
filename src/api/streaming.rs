//! `POST /api/streaming`: one question, the answer as it is written.

use std::sync::Arc;

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::{Api, Done, Request, lost, overloaded, refuse};
use crate::exchange::Question;
use crate::http::Responder;
use crate::openai;
use crate::relay::{self, ClientEnd, Draft};
use crate::upstream::Line;

/// Hands the stream to a worker and breaks the silence until it ends.
pub fn stream(api: &Api, request: &Request, responder: Responder) -> Done {
    let config = &api.config;
    let asked = Question::parse(request.body, config.max_question_chars);
    let asked = match asked.and_then(|asked| api.store.check().map(|()| asked)) {
        Ok(asked) => asked,
        Err(e) => return refuse(responder, e, request.id),
    };
    let chat = openai::chat_request(&asked, &config.model, config.system_prompt.as_deref(), true);
    let model = asked.model.unwrap_or_else(|| config.model.clone());
    let draft = Draft::new(Arc::clone(request.key), asked.question, model, request.started);
    let client = responder.client();
    let end = Arc::new(ClientEnd::new(responder, request.id.to_string()));
    let (done, outcome) = bounded(1);
    let (relayed, store) = (Arc::clone(&end), Arc::clone(&api.store));
    let job = move |line: &mut Line| {
        let _ = done.send(relay::run(line, client, &chat, &relayed, &store, draft));
    };
    let outcome = match api.pool.submit(Box::new(job)) {
        Err(_) => Err(overloaded(config)),
        Ok(()) => loop {
            match outcome.recv_timeout(end.silence_left(config.stream_heartbeat)) {
                Ok(outcome) => break outcome,
                Err(RecvTimeoutError::Timeout) => end.break_silence(config.stream_heartbeat),
                Err(RecvTimeoutError::Disconnected) => break Err(lost()),
            }
        },
    };
    match outcome {
        Ok(streamed) => Done { status: 200, bytes: streamed.bytes, model: Some(streamed.model), code: streamed.failure },
        Err(e) => match end.unanswered() {
            Some(responder) => refuse(responder, e, request.id),
            None => Done { status: 200, bytes: end.abort(), model: None, code: Some(e.code) },
        },
    }
}
