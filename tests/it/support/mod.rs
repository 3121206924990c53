//! What the tests are made of: the program, a scripted upstream, a raw client.

pub mod client;
pub mod folder;
pub mod gate;
pub mod hostile;
pub mod proxy;
pub mod tls;
pub mod upstream;

use std::time::{Duration, Instant};

/// How long a test waits for something that must happen. Only a bound on a hang: nothing is expected to need it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `check` holds, for what can only be seen by looking again.
#[track_caller]
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let started = Instant::now();
    while !check() {
        assert!(started.elapsed() < PATIENCE, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
