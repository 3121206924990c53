//! A gate that holds a script until the test opens it: order without sleeping.

use super::PATIENCE;
use std::sync::{Arc, Condvar, Mutex};

#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn new() -> Gate {
        Gate::default()
    }

    /// As many gates as a script has places to wait at.
    pub fn several<const N: usize>() -> [Gate; N] {
        std::array::from_fn(|_| Gate::new())
    }

    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    /// True once it is open, false where the test has forgotten it.
    pub fn wait(&self) -> bool {
        let guard = self.0.0.lock().unwrap();
        let (open, _) = self.0.1.wait_timeout_while(guard, PATIENCE * 2, |open| !*open).unwrap();
        *open
    }
}
