//! `GET /v1/models` and `GET /v1/models/{id}`: the upstream's own answer.

use std::net::TcpStream;
use std::sync::Arc;

use super::{Api, Errand, Exit, Kind, Parting, Request};
use crate::http::Reply;
use crate::upstream::Line;

/// A request for models that waits for a worker.
pub struct Models {
    /// Empty, or `/` and a model's name.
    path: String,
    pub(super) exit: Exit,
}

/// Keeps a request for the list, or for the model that its path names, for a worker.
pub fn prepare(request: &Request, exit: Exit) -> Errand {
    let path = request.head.path().strip_prefix("/v1/models").unwrap_or_default().to_string();
    Errand::new(exit.responder.client(), Kind::Models(Box::new(Models { path, exit })))
}

impl Models {
    /// Asks and answers; returns the answer where the client may be slow to take it.
    #[inline(never)]
    pub fn run(self: Box<Models>, api: &Api, line: &mut Line, client: Arc<TcpStream>) -> Option<Parting> {
        match line.models(client, &self.path) {
            Ok((body, headers)) => self.exit.send_or_part(api, Reply { headers, ..Reply::json(200, body) }, None),
            Err(e) => self.exit.refuse(e),
        }
    }
}
