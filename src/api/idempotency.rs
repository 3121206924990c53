//! `Idempotency-Key`: the same request twice is asked once. Knows running requests; the answered ones
//! are the history's.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::places::Taken;
use super::{Api, IDEMPOTENCY_KEY, Request};
use crate::error::{ApiError, Code};
use crate::lock::{lock, wait_within};
use crate::store::{Remembered, Unique};

/// Who waits looks so often whether its client is still there.
const GLANCE: Duration = Duration::from_millis(500);

/// A key's name and its word for the request.
type Name = (Arc<str>, String);

/// The requests with an `Idempotency-Key` that are running now: their paths and bodies.
#[derive(Default)]
pub struct Idempotency {
    running: Mutex<HashMap<Name, (String, Vec<u8>)>>,
    ended: Condvar,
}

/// What a request with an `Idempotency-Key` is to do.
pub enum Part {
    /// Ask; others with the same key wait until the first is dropped. The history is to note the second beside the answer.
    First(First, Unique),
    /// Repeat what was answered, and then leave the place among what is put together.
    Again(Box<Remembered>, Taken),
}

/// The turn of the first of some equal requests.
pub struct First {
    idempotency: Arc<Idempotency>,
    name: Name,
}

impl Drop for First {
    fn drop(&mut self) {
        lock(&self.idempotency.running).remove(&self.name);
        self.idempotency.ended.notify_all();
    }
}

impl Idempotency {
    /// The request's turn, after any equal one that is running; `None` where it has no
    /// `Idempotency-Key`. Errs with 422 where the key came with another request before, with 503 where equal
    /// ones are running for longer than a call may take, and where `is_gone` says that the client left meanwhile.
    pub fn turn(
        self: &Arc<Idempotency>,
        api: &Api,
        request: &Request,
        is_gone: impl Fn() -> bool,
    ) -> Result<Option<Part>, ApiError> {
        let Some(given) = request.head.field(IDEMPOTENCY_KEY) else { return Ok(None) };
        if !(1..=255).contains(&given.len()) || !given.bytes().all(|b| matches!(b, b' '..=b'~')) {
            return Err(ApiError::invalid("Idempotency-Key", "Idempotency-Key must have 1 to 255 printable ASCII characters"));
        }
        let (name, path) = ((Arc::clone(request.key), given.to_string()), request.head.path());
        let until = Instant::now() + api.config.upstream_timeout;
        let mut running = lock(&self.running);
        while let Some((other_path, other_body)) = running.get(&name) {
            if (&**other_path, &**other_body) != (path, request.body) {
                return Err(another());
            }
            if is_gone() {
                return Err(ApiError::client_gone());
            }
            if Instant::now() >= until {
                let text = "requests with this Idempotency-Key have been running for too long; try again";
                return Err(ApiError::new(Code::OVERLOADED, text));
            }
            running = wait_within(&self.ended, running, GLANCE);
        }
        running.insert(name.clone(), (path.to_string(), request.body.to_vec()));
        drop(running);
        let first = First { idempotency: Arc::clone(self), name };
        let place = api.make()?;
        match api.store.remembered(request.key, given)? {
            None => {
                let (key, path) = (given.to_string(), path.to_string());
                let unique = Unique { key, path, request: request.body.to_vec(), response: None };
                Ok(Some(Part::First(first, unique)))
            }
            Some(remembered) if remembered.path == path && remembered.request == request.body => {
                Ok(Some(Part::Again(Box::new(remembered), place)))
            }
            Some(_) => Err(another()),
        }
    }
}

fn another() -> ApiError {
    ApiError::invalid("Idempotency-Key", "this Idempotency-Key came with another request within the last 24 hours")
}
