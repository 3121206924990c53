//! A pool of at most so many threads, and the bounded queue before it. Knows jobs, not what they do.
//!
//! A thread starts one job ahead of its need and ends when it had nothing to do for a while. The thread
//! that was idle last gets the next job, so that few threads, and few connections of theirs, stay warm.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use oneshot::{Receiver, Sender};

use crate::kernel;
use crate::lock::{lock, wait_within};

/// What a thread, with its own `W`, is to do.
pub type Job<W> = Box<dyn FnOnce(&mut W) + Send>;

/// Whether the client of a queued job has gone: to do such a job is to log it.
pub type IsVain = Box<dyn Fn() -> bool + Send>;

/// A thread uses little of its stack, but JSON 128 levels deep takes this much in a debug build. Only
/// what is used of it takes memory.
const STACK: usize = 512 * 1024;

/// A thread whose last answer is out needs a moment until it is idle: a worker stays with its client for 20 ms first, and a
/// socket's wait may take two ticks of the clock more. Nobody is refused for that.
const MOMENT: Duration = Duration::from_millis(50);

/// Threads that cannot be started within so long of each other are one lack of them.
const A_ROW: Duration = Duration::from_secs(1);

/// How often a full queue is looked through for jobs that are vain, and how many of them are looked at.
const SWEEP: Duration = Duration::from_millis(100);
const SWEPT: usize = 1000;

/// A thread that had nothing to do for this long gives back what it does not use of its stack.
const REST: Duration = Duration::from_secs(1);

/// So many idle threads rest on; those below them, which only a burst would reach, end. What each keeps adds up: 500 streams
/// after a busy minute take 24 MiB, and 29 where all rest on.
const RESTING: usize = 64;

/// How busy the pool is.
pub struct Load {
    pub busy: usize,
    pub total: usize,
    pub queued: usize,
}

/// The pool, shared by those who give it work and its threads.
pub struct Pool<W> {
    state: Mutex<State<W>>,
    /// A thread became idle or a place in the queue free, while somebody waited for that.
    freed: Condvar,
    name: &'static str,
    size: usize,
    queue_size: usize,
    patience: Duration,
    make: Box<dyn Fn() -> W + Send + Sync>,
}

struct State<W> {
    /// Ways to idle threads, the last one to become idle at the end.
    idle: Vec<(u64, Sender<Job<W>>)>,
    queue: VecDeque<(Job<W>, IsVain)>,
    next_sweep: Instant,
    threads: usize,
    /// The first and the last time in a row that no thread could be started.
    scarce: Option<(Instant, Instant)>,
    /// Who waits a moment for a thread that is about to be free.
    waiting: usize,
    /// For threads' names and idle threads' ids.
    numbers: u64,
}

impl<W> State<W> {
    /// Where an idle thread stands; `None`: it is to have a job.
    fn place(&self, id: u64) -> Option<usize> {
        self.idle.iter().position(|(other, _)| *other == id)
    }
}

impl<W: 'static> Pool<W> {
    /// A pool of at most `size` threads called `name`, each with what `make` makes, and room for
    /// `queue_size` waiting jobs. A thread without a job ends after `patience`.
    pub fn new(
        name: &'static str,
        size: usize,
        queue_size: usize,
        patience: Duration,
        make: impl Fn() -> W + Send + Sync + 'static,
    ) -> Arc<Pool<W>> {
        let state = State {
            idle: Vec::new(),
            queue: VecDeque::new(),
            next_sweep: Instant::now(),
            threads: 0,
            scarce: None,
            waiting: 0,
            numbers: 0,
        };
        let (state, freed) = (Mutex::new(state), Condvar::new());
        Arc::new(Pool { state, freed, name, size, queue_size, patience, make: Box::new(make) })
    }

    /// Has an idle thread do the job that `job` makes of `task`, else a new one, else queues it. With all threads busy and
    /// the queue full the caller first does the queued jobs that are vain, to make room. Where there is still none after
    /// a moment, the task comes back.
    pub fn give<T>(
        self: &Arc<Self>,
        task: T,
        is_vain: impl FnOnce(&T) -> IsVain,
        job: impl FnOnce(T) -> Job<W>,
    ) -> Result<(), T> {
        let mut state = lock(&self.state);
        let until = Instant::now() + MOMENT;
        let thread = loop {
            let idle_or_new = state.idle.pop().or_else(|| self.start(&mut state));
            if let Some((_, thread)) = idle_or_new {
                break thread;
            }
            let left = until.saturating_duration_since(Instant::now());
            // Where there is no thread at all, nobody would come for what is in the queue. One that could not be started may be
            // in a moment, and those that are there may be at work for long.
            let is_lasting = state.scarce.is_some_and(|(first, last)| last - first >= MOMENT);
            let is_all = state.threads >= self.size || is_lasting || left.is_zero();
            if state.queue.len() < self.queue_size && state.threads > 0 && is_all {
                let is_vain = is_vain(&task);
                state.queue.push_back((job(task), is_vain));
                return Ok(());
            }
            let vain = state.sweep();
            if !vain.is_empty() {
                drop(state);
                self.be_done_with(vain);
                // There may be room for others that wait, too.
                self.freed.notify_all();
                state = lock(&self.state);
                continue;
            }
            if left.is_zero() {
                return Err(task);
            }
            state.waiting += 1;
            state = wait_within(&self.freed, state, left);
            state.waiting -= 1;
        };
        drop(state);
        // A thread that is promised a job waits for it.
        let _ = thread.send(job(task));
        self.spare();
        Ok(())
    }

    /// Somebody waits for a thread.
    pub fn is_wanted(&self) -> bool {
        let state = lock(&self.state);
        state.queue.len() + state.waiting > 0
    }

    /// All threads that there may be are at work.
    pub fn is_exhausted(&self) -> bool {
        let state = lock(&self.state);
        state.idle.is_empty() && state.threads >= self.size
    }

    /// How busy it is now.
    pub fn load(&self) -> Load {
        let state = lock(&self.state);
        Load { busy: state.threads - state.idle.len(), total: self.size, queued: state.queue.len() }
    }

    /// Starts a thread, which is for a job or idle from now on; `None`: there may be no more.
    fn start(self: &Arc<Self>, state: &mut State<W>) -> Option<(u64, Sender<Job<W>>)> {
        if state.threads >= self.size {
            return None;
        }
        state.numbers += 1;
        let id = state.numbers;
        let (way, coming) = oneshot::channel();
        let thread = thread::Builder::new().name(format!("{}-{id}", self.name)).stack_size(STACK);
        let own = Arc::clone(self);
        let started = thread.spawn(move || own.work(id, coming));
        if let Err(e) = started {
            let now = Instant::now();
            let row = state.scarce.filter(|(_, last)| now - *last < A_ROW);
            if row.is_none() {
                log::warn!("no thread for a {}: {e}", self.name);
            }
            state.scarce = Some((row.map_or(now, |(first, _)| first), now));
            return None;
        }
        state.scarce = None;
        state.threads += 1;
        Some((id, way))
    }

    /// Starts a thread ahead where none is idle, so that the next job need not wait for that.
    fn spare(self: &Arc<Self>) {
        let is_due = |state: &State<W>| state.idle.is_empty() && state.threads < self.size;
        if !is_due(&lock(&self.state)) {
            return;
        }
        // To start one takes 70 us; who was given the job goes first where both want this CPU.
        thread::yield_now();
        let mut state = lock(&self.state);
        if is_due(&state)
            && let Some((id, spare)) = self.start(&mut state)
        {
            // Where none could be started before, somebody may wait.
            match state.queue.pop_front() {
                Some((job, _)) => drop(spare.send(job)),
                None => state.idle.push((id, spare)),
            }
        }
    }
}

impl<W> State<W> {
    /// Takes the vain jobs out of the queue.
    fn sweep(&mut self) -> Vec<Job<W>> {
        let now = Instant::now();
        if now < self.next_sweep {
            return Vec::new();
        }
        self.next_sweep = now + SWEEP;
        let first = self.queue.len().min(SWEPT);
        let (vain, mut kept): (VecDeque<_>, VecDeque<_>) = self.queue.drain(..first).partition(|(_, is_vain)| is_vain());
        kept.append(&mut self.queue);
        self.queue = kept;
        vain.into_iter().map(|(job, _)| job).collect()
    }
}

impl<W> Pool<W> {
    fn be_done_with(&self, vain: Vec<Job<W>>) {
        let mut own = (self.make)();
        vain.into_iter().for_each(|job| self.carry_out(job, &mut own));
    }

    /// Does a job. What it leaves behind in a panic may be in pieces, and is made anew.
    fn carry_out(&self, job: Job<W>, own: &mut W) {
        if catch_unwind(AssertUnwindSafe(|| job(own))).is_err() {
            *own = (self.make)();
        }
    }

    fn work(&self, id: u64, coming: Receiver<Job<W>>) {
        // A new thread inherits SCHED_BATCH from its starter.
        kernel::make_way(false);
        let mut own = (self.make)();
        let mut next = self.rest(id, coming);
        while let Some(job) = next {
            self.carry_out(job, &mut own);
            next = self.next();
        }
    }

    /// The next job; `None` where the thread is to end.
    fn next(&self) -> Option<Job<W>> {
        let mut state = lock(&self.state);
        if state.waiting > 0 {
            self.freed.notify_one();
        }
        if let Some((job, _)) = state.queue.pop_front() {
            return Some(job);
        }
        state.numbers += 1;
        let id = state.numbers;
        let (way, coming) = oneshot::channel();
        state.idle.push((id, way));
        drop(state);
        self.rest(id, coming)
    }

    /// The job that comes to an idle thread; `None` where the thread is to end.
    fn rest(&self, id: u64, coming: Receiver<Job<W>>) -> Option<Job<W>> {
        let until = Instant::now() + self.patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if let Ok(job) = coming.recv_timeout(REST.min(left)) {
                return Some(job);
            }
            kernel::forget_unused_stack();
            // Others may have come to rest meanwhile, which are taken before it.
            if left <= REST || !self.may_rest(id) {
                break;
            }
        }
        let mut state = lock(&self.state);
        let Some(place) = state.place(id) else {
            drop(state);
            // A job is on its way to it; if `give` panicked before it sent that, wait anew.
            return coming.recv().ok().or_else(|| self.next());
        };
        state.idle.remove(place);
        state.threads -= 1;
        let is_last = state.threads == 0;
        drop(state);
        if is_last {
            kernel::forget_unused_heap();
        }
        None
    }

    /// This thread is idle, and not one of those that only a burst would reach.
    fn may_rest(&self, id: u64) -> bool {
        let state = lock(&self.state);
        state.place(id).is_some_and(|place| state.idle.len() - place <= RESTING)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(60);

    /// A pool of one thread that is busy until the returned sender is dropped.
    fn one_busy(queue_size: usize) -> (Arc<Pool<()>>, mpsc::Sender<()>) {
        let pool = Pool::new("test", 1, queue_size, LONG, || ());
        let (busy, until) = mpsc::channel::<()>();
        give(&pool, move || assert!(until.recv().is_err()));
        (pool, busy)
    }

    fn give(pool: &Arc<Pool<()>>, job: impl FnOnce() + Send + 'static) {
        assert!(pool.give((), |()| Box::new(|| false), |()| Box::new(|()| job())).is_ok(), "there is room");
    }

    fn is_done(pool: &Arc<Pool<()>>) -> mpsc::Receiver<()> {
        let (done, told) = mpsc::channel();
        give(pool, move || done.send(()).expect("the test waits"));
        told
    }

    #[test]
    fn what_waits_in_the_queue_is_done_and_what_finds_no_room_comes_back() {
        let (pool, busy) = one_busy(1);
        let told = is_done(&pool);
        assert_eq!(pool.give(7, |_| Box::new(|| false), |_| Box::new(|()| ())), Err(7));
        drop(busy);
        assert_eq!(told.recv_timeout(LONG), Ok(()));
        assert_eq!(is_done(&pool).recv_timeout(LONG), Ok(()));
        assert_eq!(pool.load().queued, 0);
    }

    #[test]
    fn threads_that_end_are_counted_once_and_new_ones_start() {
        let pool = Pool::new("test", 5, 0, Duration::from_millis(1), || ());
        for _ in 0..3 {
            assert_eq!(is_done(&pool).recv_timeout(LONG), Ok(()));
            while lock(&pool.state).threads > 0 {
                thread::yield_now();
            }
            // A thread that counts itself out twice does so after it has waited once more.
            thread::sleep(Duration::from_millis(20));
            assert_eq!(lock(&pool.state).threads, 0);
        }
    }

    #[test]
    fn after_a_burst_only_some_threads_rest_on_also_where_it_ends_bit_by_bit() {
        let pool = Pool::new("test", 2 * RESTING, 0, LONG, || ());
        let half = || {
            let (busy, until) = mpsc::channel::<()>();
            let until = Arc::new(Mutex::new(until));
            for _ in 0..RESTING {
                let until = Arc::clone(&until);
                give(&pool, move || assert!(lock(&until).recv().is_err()));
            }
            busy
        };
        let halves = [half(), half()];
        for busy in halves {
            // Those before have rested for longer than that when the next come.
            thread::sleep(REST * 3 / 2);
            drop(busy);
        }
        let began = std::time::Instant::now();
        while lock(&pool.state).threads > RESTING {
            assert!(began.elapsed() < LONG / 2, "{} threads rest", lock(&pool.state).threads);
            thread::yield_now();
        }
        // Those that are left have waited for as long.
        thread::sleep(REST / 10);
        assert_eq!(lock(&pool.state).threads, RESTING);
    }

    /// Also where the queue is too long to be looked through at once.
    #[test]
    fn what_is_not_vain_stays_in_the_queue_in_its_order() {
        let (pool, busy) = one_busy(SWEPT + 2);
        let (done, told) = mpsc::channel();
        let job = |number: usize| -> Job<()> {
            let done = done.clone();
            Box::new(move |()| done.send(number).expect("the test waits"))
        };
        for number in 0..SWEPT + 2 {
            // Of the first that are looked at one has no client any more.
            assert!(pool.give((), |()| Box::new(move || number == 1), |()| job(number)).is_ok(), "there is room");
        }
        lock(&pool.state).next_sweep = Instant::now();
        assert!(pool.give((), |()| Box::new(|| false), |()| job(SWEPT + 2)).is_ok(), "there is again");
        drop(busy);
        let order: Vec<usize> = (0..SWEPT + 3).map_while(|_| told.recv_timeout(LONG).ok()).collect();
        assert_eq!(order, [&[1, 0][..], &Vec::from_iter(2..SWEPT + 3)].concat(), "who has gone is done with first");
    }

    #[test]
    fn a_job_that_panics_costs_only_itself() {
        let (pool, busy) = one_busy(2);
        give(&pool, || panic!("on purpose"));
        let told = is_done(&pool);
        drop(busy);
        assert_eq!(told.recv_timeout(LONG), Ok(()));
    }
}
