//! The fixed pool of worker threads and the bounded queue before it. Knows jobs, not what they do.
//!
//! Threads start when they are first needed. The worker that was idle last gets the next job, so that
//! few threads, and few connections of theirs, stay warm.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::handoff::{Giver, Nothing, handoff};

/// What a worker, with its own `W`, is to do.
pub type Job<W> = Box<dyn FnOnce(&mut W) + Send>;

/// As many jobs wait as may wait.
pub struct Full;

/// How busy the pool is.
pub struct Load {
    pub busy: usize,
    pub total: usize,
    pub queued: usize,
}

/// A front to the pool, cheap to share.
pub struct Pool<W> {
    shared: Arc<Shared<W>>,
}

struct Shared<W> {
    state: Mutex<State<W>>,
    size: usize,
    queue_size: usize,
    make: Box<dyn Fn() -> W + Send + Sync>,
    /// After so long without a job a worker does this with its `W`, once.
    rest: (Duration, fn(&mut W)),
}

struct State<W> {
    /// Ways to idle workers, the last one to become idle at the end.
    idle: Vec<Giver<Job<W>>>,
    queue: VecDeque<Job<W>>,
    started: usize,
}

impl<W: 'static> Pool<W> {
    /// A pool of at most `size` workers, each with what `make` makes, and room for `queue_size` waiting
    /// jobs. A worker that had no job for `rest.0` does `rest.1`.
    pub fn new(
        size: usize,
        queue_size: usize,
        make: impl Fn() -> W + Send + Sync + 'static,
        rest: (Duration, fn(&mut W)),
    ) -> Pool<W> {
        let state = Mutex::new(State { idle: Vec::new(), queue: VecDeque::new(), started: 0 });
        Pool { shared: Arc::new(Shared { state, size, queue_size, make: Box::new(make), rest }) }
    }

    /// Gives the job to an idle worker, a new one, or the queue.
    pub fn submit(&self, job: Job<W>) -> Result<(), Full> {
        let mut state = self.shared.lock();
        if let Some(idle) = state.idle.pop() {
            drop(state);
            // An idle worker never goes away, so it takes the job.
            let _ = idle.give(job);
            return Ok(());
        }
        if state.started < self.shared.size {
            let shared = Arc::clone(&self.shared);
            let name = format!("worker-{}", state.started + 1);
            let started = std::thread::Builder::new().name(name).stack_size(256 * 1024).spawn(move || shared.work(job));
            return match started {
                Ok(_) => {
                    state.started += 1;
                    Ok(())
                }
                Err(e) => {
                    log::warn!("no thread for a worker: {e}; the request is refused");
                    Err(Full)
                }
            };
        }
        if state.queue.len() >= self.shared.queue_size {
            return Err(Full);
        }
        state.queue.push_back(job);
        Ok(())
    }

    /// How busy it is now.
    pub fn load(&self) -> Load {
        let state = self.shared.lock();
        Load { busy: state.started - state.idle.len(), total: self.shared.size, queued: state.queue.len() }
    }
}

impl<W> Shared<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, first: Job<W>) {
        let mut own = (self.make)();
        let mut next = Some(first);
        while let Some(job) = next {
            // What a job leaves behind in a panic may be in pieces.
            if catch_unwind(AssertUnwindSafe(|| job(&mut own))).is_err() {
                own = (self.make)();
            }
            next = self.next(&mut own);
        }
    }

    fn next(&self, own: &mut W) -> Option<Job<W>> {
        let coming = {
            let mut state = self.lock();
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            let (giver, coming) = handoff();
            state.idle.push(giver);
            coming
        };
        match coming.take_within(self.rest.0) {
            Ok(job) => Some(job),
            Err(Nothing::Yet) => {
                (self.rest.1)(own);
                coming.take()
            }
            Err(Nothing::Ever) => None,
        }
    }
}
