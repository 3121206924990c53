//! One value from one thread to another that waits for it. Unlike a channel's, this wait goes to sleep
//! at once: on two cores the channel's spinning and yielding cost a fifth of a request's CPU time.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::lock::{lock, wait_while};

enum State<T> {
    Empty,
    Full(T),
    /// The giver or the taker is gone.
    Closed,
}

struct Place<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

/// The end that gives, once.
pub struct Giver<T>(Arc<Place<T>>);

/// The end that waits.
pub struct Taker<T>(Arc<Place<T>>);

/// Why nothing was taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Nothing {
    /// The time came first.
    Yet,
    /// The giver is gone and nothing will come.
    Ever,
}

/// The two ends of a handoff.
pub fn handoff<T>() -> (Giver<T>, Taker<T>) {
    let place = Arc::new(Place { state: Mutex::new(State::Empty), changed: Condvar::new() });
    (Giver(Arc::clone(&place)), Taker(place))
}

impl<T> Giver<T> {
    /// Gives the value; it is dropped where nobody can take it any more.
    pub fn give(self, value: T) {
        let mut state = lock(&self.0.state);
        if matches!(*state, State::Empty) {
            *state = State::Full(value);
            drop(state);
            self.0.changed.notify_one();
        }
    }

    /// False when nobody can take the value any more.
    pub fn is_awaited(&self) -> bool {
        !matches!(*lock(&self.0.state), State::Closed)
    }
}

impl<T> Drop for Giver<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        if matches!(*state, State::Empty) {
            *state = State::Closed;
            drop(state);
            self.0.changed.notify_one();
        }
    }
}

impl<T> Taker<T> {
    /// Waits for the value; `None` where the giver went without giving.
    pub fn take(&self) -> Option<T> {
        self.take_within(Duration::MAX).ok()
    }

    /// Waits for the value at most so long.
    pub fn take_within(&self, time: Duration) -> Result<T, Nothing> {
        let is_empty = |state: &mut State<T>| matches!(state, State::Empty);
        let state = wait_while(&self.0.changed, lock(&self.0.state), time, is_empty);
        match std::mem::replace(&mut *state.ok_or(Nothing::Yet)?, State::Closed) {
            State::Full(value) => Ok(value),
            _ => Err(Nothing::Ever),
        }
    }
}

impl<T> Drop for Taker<T> {
    fn drop(&mut self) {
        // What nobody will take is dropped here, not when the giver's thread ends.
        let left = std::mem::replace(&mut *lock(&self.0.state), State::Closed);
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_crosses_threads_once() {
        let (giver, taker) = handoff();
        let thread = std::thread::spawn(move || giver.give(7));
        assert_eq!(taker.take(), Some(7));
        assert_eq!(taker.take(), None);
        thread.join().expect("no panic");
    }

    #[test]
    fn nothing_comes_from_who_is_gone() {
        let (giver, taker) = handoff::<u8>();
        assert_eq!(taker.take_within(Duration::ZERO), Err(Nothing::Yet));
        drop(giver);
        assert_eq!(taker.take_within(Duration::from_secs(60)), Err(Nothing::Ever));
        let (giver, taker) = handoff();
        assert!(giver.is_awaited());
        drop(taker);
        assert!(!giver.is_awaited());
        giver.give(1);
    }
}
