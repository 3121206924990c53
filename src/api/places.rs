//! A counting semaphore with a time limit: for threads that do something, or bytes in memory. Knows nothing of what
//! takes them.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::lock::{lock, wait_while};

/// So many places, shared by all who take them.
pub struct Places {
    taken: Mutex<usize>,
    freed: Condvar,
    most: usize,
}

/// Some of the places, until it is dropped.
pub struct Taken {
    places: Arc<Places>,
    count: usize,
}

impl Places {
    /// So many places, none of them taken.
    pub fn new(most: usize) -> Arc<Places> {
        Arc::new(Places { taken: Mutex::default(), freed: Condvar::new(), most })
    }

    /// Takes `count` of them, after a while if need be; `None`: there was no room within `patience`. More than there are
    /// in all get in alone.
    pub fn take(self: &Arc<Places>, count: usize, patience: Duration) -> Option<Taken> {
        let mut taken =
            wait_while(&self.freed, lock(&self.taken), patience, |taken| count > 0 && *taken > 0 && *taken + count > self.most)?;
        *taken += count;
        Some(Taken { places: Arc::clone(self), count })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        *lock(&self.places.taken) -= self.count;
        // One that frees much may let in several.
        self.places.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_wants_more_than_there_are_gets_in_alone() {
        let places = Places::new(10);
        let one = places.take(1, Duration::ZERO);
        assert!(one.is_some() && places.take(11, Duration::ZERO).is_none());
        drop(one);
        let all = places.take(11, Duration::ZERO);
        assert!(all.is_some() && places.take(1, Duration::ZERO).is_none());
        assert!(places.take(0, Duration::ZERO).is_some(), "who wants none waits for nobody");
        drop(all);
        assert!(places.take(10, Duration::ZERO).is_some());
    }
}
