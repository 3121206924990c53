//! Whole answers, stored before they are given: `POST /api/ask`, and `POST /v1/chat/completions`
//! without `stream`.

use std::sync::Arc;

use super::once::Turn;
use super::{Answered, Api, Request, lost, overloaded};
use crate::clock;
use crate::error::{ApiError, Header};
use crate::exchange::{Exchange, Pair, Question};
use crate::handoff::handoff;
use crate::http::{Reply, Responder};
use crate::openai::Chat;
use crate::store::Unique;
use crate::upstream::Line;

/// `POST /api/ask`: a question, its answer.
pub fn ask(api: &Api, request: &Request, responder: &Responder) -> Result<Answered, ApiError> {
    const PATH: &str = "/api/ask";
    let config = &api.config;
    let asked = Question::parse(request.body, config.max_question_chars)?;
    let turn = api.once.turn(request, PATH, &api.store)?;
    let exchange = match &turn {
        Some(Turn::Again(remembered)) => &remembered.exchange,
        _ => {
            let chat = Chat::from_question(asked, &config.model, config.system_prompt.as_deref(), false);
            let unique = first(&turn, PATH, request);
            &complete(api, request, responder, chat, unique, false)?.0
        }
    };
    let body = serde_json::to_vec(exchange).unwrap_or_default();
    Ok(Answered { reply: Reply::json(200, body), model: Some(exchange.model.clone()) })
}

/// `POST /v1/chat/completions` without `stream`: the upstream's answer, byte for byte.
pub fn completion(api: &Api, request: &Request, responder: &Responder, chat: Chat) -> Result<Answered, ApiError> {
    const PATH: &str = "/v1/chat/completions";
    let turn = api.once.turn(request, PATH, &api.store)?;
    if let Some(Turn::Again(remembered)) = turn {
        let body = remembered.response.unwrap_or_default();
        return Ok(Answered { reply: Reply::json(200, body), model: Some(remembered.exchange.model) });
    }
    let unique = first(&turn, PATH, request);
    let (exchange, body, headers) = complete(api, request, responder, chat, unique, true)?;
    let mut reply = Reply::json(200, body);
    reply.headers = headers;
    Ok(Answered { reply, model: Some(exchange.model) })
}

fn first(turn: &Option<Turn>, path: &'static str, request: &Request) -> Option<Unique> {
    match turn {
        Some(Turn::First(first)) => Some(first.unique(path, request.body)),
        _ => None,
    }
}

/// Asks the LLM and stores the pair. Returns it with the answer's own bytes and head fields.
fn complete(
    api: &Api,
    request: &Request,
    responder: &Responder,
    mut chat: Chat,
    mut unique: Option<Unique>,
    as_it_came: bool,
) -> Result<(Exchange, Vec<u8>, Vec<Header>), ApiError> {
    api.store.check()?;
    let (client, key, store) = (responder.client(), Arc::clone(request.key), Arc::clone(&api.store));
    let (started, (done, answer), (pass, passed)) = (request.started, handoff(), handoff());
    let job = move |line: &mut Line| {
        let whole = match line.complete(client, &mut chat) {
            Ok(whole) => whole,
            Err(e) => return drop(done.give(Err(e))),
        };
        let completion = whole.completion;
        let pair = Pair {
            key,
            question: chat.question,
            answer: completion.answer,
            model: completion.model.filter(|model| !model.is_empty()).unwrap_or(chat.model),
            finish_reason: completion.finish_reason,
            usage: completion.usage,
            latency_ms: started.elapsed().as_millis() as u64,
            created_at: clock::now(),
        };
        if let (Some(unique), true) = (&mut unique, as_it_came) {
            unique.response = Some(whole.body.clone());
        }
        let _ = pass.give((whole.body, whole.headers));
        // The worker is free while the pair is being committed; the history answers in its stead.
        store.append(pair, unique, done);
    };
    api.pool.submit(Box::new(job)).map_err(|_| overloaded(&api.config))?;
    let exchange = answer.take().unwrap_or_else(|| Err(lost()))?;
    let (body, headers) = passed.take().ok_or_else(lost)?;
    Ok((exchange, body, headers))
}
