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
        if self.count == 1 { self.places.freed.notify_one() } else { self.places.freed.notify_all() }
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

    #[test]
    fn all_for_whom_there_is_room_get_in_when_it_is_there() {
        const LONG: Duration = Duration::from_secs(20);
        let places = Places::new(10);
        let all = places.take(10, Duration::ZERO);
        let inside = std::sync::Barrier::new(5);
        std::thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| {
                    let began = std::time::Instant::now();
                    let taken = places.take(2, LONG);
                    let waited = began.elapsed();
                    // Nobody who leaves lets in another one.
                    inside.wait();
                    assert!(taken.is_some() && waited < LONG / 2, "it was told");
                });
            }
            // Until they wait. Who comes later gets in without.
            std::thread::sleep(Duration::from_millis(50));
            drop(all);
        });
    }
}
