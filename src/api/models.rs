//! `GET /v1/models` and `GET /v1/models/{id}`: the upstream's own answer.

use std::net::TcpStream;
use std::sync::Arc;

use super::{Api, Exit, Parting, Request};
use crate::http::Reply;
use crate::upstream::Line;

/// A request for models that waits for a worker.
pub struct Models {
    /// Empty, or `/` and a model's name.
    path: String,
    pub(super) exit: Exit,
}

impl Models {
    /// The list, or the one that the request's path names.
    pub fn new(request: &Request, exit: Exit) -> Models {
        Models { path: request.head.path().strip_prefix("/v1/models").unwrap_or_default().to_string(), exit }
    }

    /// Asks and answers; returns the answer where the client may be slow to take it.
    #[inline(never)]
    pub fn run(self: Box<Models>, api: &Api, line: &mut Line, client: Arc<TcpStream>) -> Option<Parting> {
        match line.models(client, &self.path) {
            Ok((body, headers)) => {
                let mut reply = Reply::json(200, body);
                reply.headers = headers;
                self.exit.send_or_part(api, reply, None)
            }
            Err(e) => self.exit.refuse(e),
        }
    }
}
