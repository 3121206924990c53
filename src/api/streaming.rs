//! Answers as they are written: `POST /api/streaming`, and `POST /v1/chat/completions` with `stream`.

use std::net::TcpStream;
use std::sync::Arc;

use super::route::Endpoint;
use super::{Api, Done, Entry, Errand, Exit, Kind, Request};
use crate::error::ApiError;
use crate::openai::Chat;
use crate::relay::{self, ClientEnd, Draft};
use crate::upstream::Line;

/// A stream that waits for a worker; its client hears comments meanwhile.
pub struct Stream {
    chat: Chat,
    draft: Box<Draft>,
    end: Arc<ClientEnd>,
    entry: Entry,
}

/// Keeps a chat request that is to be streamed for a worker.
pub fn prepare(api: &Api, request: &Request, exit: Exit, mut chat: Chat) -> Option<Errand> {
    if let Err(e) = api.store.check() {
        return exit.refuse(e);
    }
    let draft = Box::new(Draft::new(Arc::clone(request.key), &mut chat, request.started));
    let Exit { responder, headers, entry } = exit;
    let client = responder.client();
    let upstream_head = (request.endpoint == Endpoint::ChatCompletions).then_some(entry.own_id);
    let end = Arc::new(ClientEnd::new(responder, entry.id.clone(), headers, upstream_head));
    api.pulse.keep(&end);
    Some(Errand::new(client, Kind::Stream(Box::new(Stream { chat, draft, end, entry }))))
}

impl Stream {
    /// Relays the upstream's events to their end.
    // Not inlined, and not moved out of its box: each stream waits with every page of stack that was used.
    #[inline(never)]
    pub fn run(mut self: Box<Stream>, api: &Api, line: &mut Line, client: Arc<TcpStream>) {
        match relay::run(line, client, &mut self.chat, &self.end, &api.store, || api.in_flight() == 1, self.draft) {
            Ok(streamed) => {
                if let Some(time) = streamed.first_event {
                    api.metrics.time_to_first_token.observe(time);
                }
                if let Some(usage) = &streamed.usage {
                    api.metrics.tokens(&self.chat.model, usage.prompt_tokens, usage.completion_tokens);
                }
                let model = Some(streamed.model);
                self.entry.id = self.end.id();
                self.entry.log(&Done { status: 200, bytes: streamed.bytes, model, code: streamed.failure });
            }
            Err(e) => refuse(&self.end, self.entry, e),
        }
    }

    /// Answers with an error.
    pub fn refuse<T>(self, e: ApiError) -> Option<T> {
        refuse(&self.end, self.entry, e);
        None
    }
}

// Not inlined, for the same reason.
#[inline(never)]
fn refuse(end: &ClientEnd, mut entry: Entry, e: ApiError) {
    match end.unanswered() {
        Some((responder, headers)) => {
            Exit { responder, headers, entry }.refuse::<()>(e);
        }
        // A comment was sent while the stream waited, and with it the 200.
        None => {
            entry.id = end.id();
            entry.log(&Done { status: 200, bytes: end.fail(&e), model: None, code: Some(e.code) });
        }
    }
}
