//! `POST /api/ask`: one question, the whole answer, stored before it is given.

use std::sync::Arc;

use crossbeam_channel::bounded;

use super::{Api, Request, lost, overloaded};
use crate::clock;
use crate::error::ApiError;
use crate::exchange::{Pair, Question};
use crate::http::{Reply, Responder};
use crate::openai;
use crate::upstream::Line;

/// Asks the LLM and stores the pair. Returns the reply and the model for the log.
pub fn ask(api: &Api, request: &Request, responder: &Responder) -> Result<(Reply, Option<String>), ApiError> {
    let config = &api.config;
    let asked = Question::parse(request.body, config.max_question_chars)?;
    api.store.check()?;
    let chat = openai::chat_request(&asked, &config.model, config.system_prompt.as_deref(), false);
    let model = asked.model.unwrap_or_else(|| config.model.clone());
    let (client, key, store) = (responder.client(), Arc::clone(request.key), Arc::clone(&api.store));
    let (started, (done, answer)) = (request.started, bounded(1));
    let job = move |line: &mut Line| {
        let completion = match line.complete(client, &chat) {
            Ok(completion) => completion,
            Err(e) => return drop(done.send(Err(e))),
        };
        let pair = Pair {
            key,
            question: asked.question,
            answer: completion.answer,
            model: completion.model.filter(|model| !model.is_empty()).unwrap_or(model),
            finish_reason: completion.finish_reason,
            usage: completion.usage,
            latency_ms: started.elapsed().as_millis() as u64,
            created_at: clock::now(),
        };
        // The worker is free while the pair is being committed; the history answers in its stead.
        store.append(pair, done);
    };
    api.pool.submit(Box::new(job)).map_err(|_| overloaded(config))?;
    let exchange = answer.recv().unwrap_or_else(|_| Err(lost()))?;
    let body = serde_json::to_vec(&exchange).unwrap_or_default();
    Ok((Reply::json(200, body), Some(exchange.model)))
}
