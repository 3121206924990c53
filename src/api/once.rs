//! `Idempotency-Key`: the same request twice is asked once. Knows running requests; the answered ones
//! are the history's.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Request;
use crate::error::{ApiError, Code};
use crate::store::{Remembered, Store, Unique};

/// Who waits looks so often whether its client is still there.
const GLANCE: Duration = Duration::from_millis(500);

/// A key's name and its word for the request.
type Name = (Arc<str>, String);

/// The requests with an `Idempotency-Key` that are running now, with path and body.
#[derive(Default)]
pub struct Once {
    running: Mutex<HashMap<Name, (&'static str, Vec<u8>)>>,
    ended: Condvar,
}

/// What a request with an `Idempotency-Key` is to do.
pub enum Turn {
    /// Ask; others with the same key wait until this is dropped.
    First(First),
    /// Repeat what was answered.
    Again(Remembered),
}

/// The turn of the first of some equal requests.
pub struct First {
    once: Arc<Once>,
    name: Name,
}

impl Drop for First {
    fn drop(&mut self) {
        self.once.lock().remove(&self.name);
        self.once.ended.notify_all();
    }
}

impl Once {
    fn lock(&self) -> MutexGuard<'_, HashMap<Name, (&'static str, Vec<u8>)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request's turn, after any equal one that is running; `None` where it has no
    /// `Idempotency-Key`. Errs with 422 where the key came with another request before, and where `is_gone`
    /// says that the client left meanwhile.
    pub fn turn(
        self: &Arc<Once>,
        request: &Request,
        path: &'static str,
        store: &Store,
        is_gone: impl Fn() -> bool,
    ) -> Result<Option<Turn>, ApiError> {
        let Some(given) = request.idempotency_key else { return Ok(None) };
        if !(1..=255).contains(&given.len()) {
            return Err(ApiError::invalid("Idempotency-Key", "Idempotency-Key must have 1 to 255 characters"));
        }
        let name = (Arc::clone(request.key), given.to_string());
        let mut running = self.lock();
        loop {
            match running.entry(name.clone()) {
                Entry::Vacant(place) => {
                    place.insert((path, request.body.to_vec()));
                    break;
                }
                Entry::Occupied(first) if (first.get().0, first.get().1.as_slice()) != (path, request.body) => {
                    return Err(another());
                }
                Entry::Occupied(_) if is_gone() => return Err(ApiError::new(Code::ClientGone, "the client went away")),
                Entry::Occupied(_) => {
                    running = self.ended.wait_timeout(running, GLANCE).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
        drop(running);
        let first = First { once: Arc::clone(self), name };
        match store.remembered(request.key, given)? {
            None => Ok(Some(Turn::First(first))),
            Some(remembered) if remembered.path == path && remembered.request == request.body => {
                Ok(Some(Turn::Again(remembered)))
            }
            Some(_) => Err(another()),
        }
    }
}

impl First {
    /// What the history is to note beside the answer.
    pub fn unique(&self, path: &'static str, request: &[u8]) -> Unique {
        Unique { key: self.name.1.clone(), path, request: request.to_vec(), response: None }
    }
}

fn another() -> ApiError {
    ApiError::invalid("Idempotency-Key", "this Idempotency-Key came with another request within the last 24 hours")
}
