//! `/v1`: what every program that speaks to OpenAI asks for. Whole answers and streams are those of
//! `ask` and `streaming`; here is only what differs.

use super::{Answered, Api, Done, Request, ask, lost, overloaded, refuse, send_answered, streaming};
use crate::error::{ApiError, Header};
use crate::handoff::handoff;
use crate::http::{Reply, Responder};
use crate::openai::Chat;
use crate::upstream::Line;

/// `POST /v1/chat/completions`, whole or as a stream.
pub fn chat(api: &Api, request: &Request, responder: Responder, headers: Vec<Header>) -> Done {
    match Chat::from_body(request.body, &api.config.model, api.config.max_question_chars) {
        Ok(chat) if chat.stream => streaming::relay(api, request, responder, headers, chat),
        Ok(chat) => {
            let answered = ask::completion(api, request, &responder, chat);
            send_answered(responder, answered, headers, request.id)
        }
        Err(e) => refuse(responder, e.with_headers(headers), request.id),
    }
}

/// `GET /v1/models` and `GET /v1/models/{id}`: the upstream's own answer.
pub fn models(api: &Api, request: &Request, responder: &Responder) -> Result<Answered, ApiError> {
    let path = request.path.strip_prefix("/v1/models").unwrap_or_default().to_string();
    let (client, (done, answer)) = (responder.client(), handoff());
    let job = move |line: &mut Line| drop(done.give(line.models(client, &path)));
    api.pool.submit(Box::new(job)).map_err(|_| overloaded(&api.config))?;
    let body = answer.take().unwrap_or_else(|| Err(lost()))?;
    Ok(Answered { reply: Reply::json(200, body), model: None })
}
