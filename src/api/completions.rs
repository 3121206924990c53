//! `/v1`: what every program that speaks to OpenAI asks for. Whole answers and streams are those of
//! `ask` and `streaming`; here is only what differs.

use super::{Api, Errand, Exit, Parting, Request, ask, streaming};
use crate::error::ApiError;
use crate::http::Reply;
use crate::openai::Chat;
use crate::upstream::Line;

/// `POST /v1/chat/completions`.
pub fn prepare(api: &Api, request: &Request, exit: Exit) -> Option<Errand> {
    match Chat::from_body(request.body, &api.config.model, api.config.max_question_chars) {
        Ok(chat) if chat.stream => streaming::prepare_chat(api, request, exit, chat, true),
        Ok(chat) => ask::prepare_chat(api, request, exit, "/v1/chat/completions", chat),
        Err(e) => exit.refuse(e),
    }
}

/// `GET /v1/models` and `GET /v1/models/{id}`: the upstream's own answer.
pub struct Models {
    /// Empty, or `/` and a model's name.
    path: String,
    exit: Exit,
}

impl Models {
    /// The list, or the one that the request's path names.
    pub fn new(request: &Request, exit: Exit) -> Models {
        Models { path: request.path.strip_prefix("/v1/models").unwrap_or_default().to_string(), exit }
    }

    /// Asks and answers; returns the answer where the client may be slow to take it.
    #[inline(never)]
    pub fn run(self: Box<Models>, line: &mut Line) -> Option<Parting> {
        match line.models(self.exit.responder.client(), &self.path) {
            Ok(body) => self.exit.send_or_part(Reply::json(200, body), None),
            Err(e) => {
                self.refuse(e);
                None
            }
        }
    }

    /// Answers with an error.
    pub fn refuse(self, e: ApiError) {
        self.exit.refuse(e);
    }
}
