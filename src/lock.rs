//! Locks and their waits without poison: a panic costs its own request, and what it left under a lock is whole,
//! or made anew by who finds it. Knows nothing of what is locked.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// What the mutex guards, as soon as nobody else has it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the lock guards, together with others who only look.
pub fn share<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// The same, as soon as nobody else has it.
pub fn own<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of it until somebody notifies, no longer than `time`; that may be for no reason.
pub fn wait_within<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>, time: Duration) -> MutexGuard<'a, T> {
    condition.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner).0
}

/// Lets go of it while `is_so`, no longer than `time`; `None`: the time was over and it still is so.
pub fn wait_while<'a, T>(
    condition: &Condvar,
    guard: MutexGuard<'a, T>,
    time: Duration,
    is_so: impl FnMut(&mut T) -> bool,
) -> Option<MutexGuard<'a, T>> {
    let (guard, waited) = condition.wait_timeout_while(guard, time, is_so).unwrap_or_else(PoisonError::into_inner);
    (!waited.timed_out()).then_some(guard)
}
