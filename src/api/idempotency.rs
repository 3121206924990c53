//! `Idempotency-Key`: the same request twice is asked once. Knows running requests; the answered ones
//! are the history's.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
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

/// The requests with an `Idempotency-Key` that are running now.
#[derive(Default)]
pub struct Idempotency {
    running: Mutex<HashMap<Name, Arc<Running>>>,
    /// Tells requests apart, whose bodies may be large: others wait while it is done.
    digests: RandomState,
}

struct Running {
    /// Of its path and body.
    digest: u64,
    ended: Condvar,
}

/// What a request with an `Idempotency-Key` is to do.
pub enum Part {
    /// Ask; others with the same key wait until the first is dropped. The history is to note the second beside the answer.
    First(First, Unique),
    /// Repeat what was answered, and then leave the places among what is put together.
    Again(Box<Remembered>, Vec<Taken>),
}

/// The turn of the first of some equal requests.
pub struct First {
    idempotency: Arc<Idempotency>,
    name: Name,
}

impl Drop for First {
    fn drop(&mut self) {
        if let Some(running) = lock(&self.idempotency.running).remove(&self.name) {
            running.ended.notify_all();
        }
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
        let digest = self.digests.hash_one((path, request.body));
        let mut running = lock(&self.running);
        while let Some(other) = running.get(&name).cloned() {
            if other.digest != digest {
                drop(running);
                // That one may itself be refused, for the sake of the one that ours repeats.
                return answered(api, request, given)?.map_or_else(|| Err(another()), |again| Ok(Some(again)));
            }
            if is_gone() {
                return Err(ApiError::client_gone());
            }
            if Instant::now() >= until {
                let text = "requests with this Idempotency-Key have been running for too long; try again";
                return Err(ApiError::new(Code::OVERLOADED, text));
            }
            running = wait_within(&other.ended, running, GLANCE);
        }
        running.insert(name.clone(), Arc::new(Running { digest, ended: Condvar::new() }));
        drop(running);
        let first = First { idempotency: Arc::clone(self), name };
        if let Some(again) = answered(api, request, given)? {
            return Ok(Some(again));
        }
        let unique = Unique { key: given.to_string(), path: path.to_string(), request: request.body.to_vec(), response: None };
        Ok(Some(Part::First(first, unique)))
    }
}

/// What this request was answered before under its `Idempotency-Key`, if that is known there. Errs where it came with another.
fn answered(api: &Api, request: &Request, given: &str) -> Result<Option<Part>, ApiError> {
    // Most are the first of their kind, and need no place.
    if !api.store.is_noted(request.key, given)? {
        return Ok(None);
    }
    let places = api.make(request.key, false)?;
    let is_same = |noted: &Remembered| noted.path == request.head.path() && noted.request == request.body;
    match api.store.remembered(request.key, given)? {
        None => Ok(None),
        Some(noted) if is_same(&noted) => Ok(Some(Part::Again(Box::new(noted), places))),
        Some(_) => Err(another()),
    }
}

fn another() -> ApiError {
    ApiError::invalid("Idempotency-Key", "this Idempotency-Key came with another request within the last 24 hours")
}
