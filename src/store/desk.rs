//! The desk at which the writer of the history works: who hands a pair over may do the writing, and the clerk does the rest.
//! Knows threads and orders, not rows.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::thread::{self, Thread};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::Order;
use super::writer::{QUIET, Writer};
use crate::lock::lock;

/// Where the writer works. Whoever hands something over while nobody writes may do the writing, which costs no change
/// of threads; what comes meanwhile, and the housekeeping, is its own thread's, the clerk's.
pub struct Desk {
    orders: Sender<Order>,
    inbox: Receiver<Order>,
    writer: Mutex<Writer>,
    clerk: OnceLock<Thread>,
    is_closed: AtomicBool,
}

impl Desk {
    /// A desk with its clerk, who works until an order to close. Errs where there is no thread for that.
    pub fn open(writer: Writer) -> std::io::Result<Arc<Desk>> {
        let (orders, inbox) = unbounded();
        let (clerk, is_closed) = (OnceLock::new(), AtomicBool::new(false));
        let desk = Arc::new(Desk { orders, inbox, writer: Mutex::new(writer), clerk, is_closed });
        let attended = Arc::clone(&desk);
        let clerk = thread::Builder::new().name("history".into()).spawn(move || attended.attend())?;
        desk.clerk.get_or_init(|| clerk.thread().clone());
        Ok(desk)
    }

    /// Sees to it that the order is carried out, by this thread where it may `lead`.
    pub fn order(&self, order: Order, lead: bool) {
        self.leave(order);
        self.hurry(lead);
    }

    /// Leaves an order and wakes nobody: it is carried out together with the next that is hurried.
    pub fn leave(&self, order: Order) {
        // It fails only where there is no inbox any more.
        let _ = self.orders.send(order);
    }

    /// Sees to it that all orders are carried out, by this thread where it may `lead`.
    pub fn hurry(&self, lead: bool) {
        // Either who writes sees the order after leaving the desk, or we see that the desk is free.
        fence(Ordering::SeqCst);
        // When the clerk has gone, nobody else would say so.
        if !lead && !self.is_closed.load(Ordering::Relaxed) {
            return self.wake();
        }
        let mut writer = match self.writer.try_lock() {
            Ok(writer) => writer,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            // Whoever writes looks again when done.
            Err(TryLockError::WouldBlock) => return,
        };
        writer.work(&self.inbox);
        let asleep = std::mem::take(&mut writer.is_clerk_asleep);
        drop(writer);
        if asleep || self.has_orders() {
            self.hurry(false);
        }
    }

    fn has_orders(&self) -> bool {
        fence(Ordering::SeqCst);
        !self.inbox.is_empty()
    }

    fn wake(&self) {
        if let Some(clerk) = self.clerk.get() {
            clerk.unpark();
        }
    }

    fn attend(&self) {
        loop {
            // What a panic leaves behind, a transaction that is open, is an error of the next, which opens anew.
            let rest = catch_unwind(AssertUnwindSafe(|| {
                let mut writer = lock(&self.writer);
                while writer.work(&self.inbox) {
                    // What waits for quiet would never come under a steady load.
                    writer.catch_up();
                }
                writer.housekeep()
            }));
            match rest {
                Ok(Some(time)) if time.is_zero() || self.has_orders() => {}
                Ok(Some(time)) => thread::park_timeout(time),
                Ok(None) => {
                    self.is_closed.store(true, Ordering::Relaxed);
                    // Who did not see that has left an order to us.
                    return self.hurry(false);
                }
                Err(_) => thread::park_timeout(QUIET),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use oneshot::RecvTimeoutError;

    use super::super::Arrival;
    use super::*;
    use crate::config::Durability;
    use crate::exchange::Pair;
    use crate::metrics::Metrics;

    /// The clerk never comes to keep house then.
    #[test]
    fn no_search_waits_for_ever_while_pairs_come_without_a_pause() {
        fn come_on_and_on(desk: &Arc<Desk>, is_over: &Arc<AtomicBool>) {
            let (next, over) = (Arc::clone(desk), Arc::clone(is_over));
            // There before the writer looks again.
            let then = move |_| {
                if !over.load(Ordering::Relaxed) {
                    come_on_and_on(&next, &over)
                }
            };
            desk.leave(Order::Append(Box::new(Arrival::new(Pair::default(), None, then))));
        }
        let path = std::env::temp_dir().join(format!("ai-proxy-{}-search.db", std::process::id()));
        let mut writer = Writer::new(path.clone(), Durability::Normal, Arc::default(), Arc::new(Metrics::new(&[], &[])));
        assert_eq!(writer.prove(), Ok(()));
        let desk = Desk::open(writer).expect("a thread");
        let is_over = Arc::new(AtomicBool::new(false));
        come_on_and_on(&desk, &is_over);
        let (done, indexed) = oneshot::channel();
        desk.order(Order::Index(done), false);
        let told = indexed.recv_timeout(Duration::from_secs(20));
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(told, Err(RecvTimeoutError::Disconnected), "its words are indexed");
        let (done, closed) = oneshot::channel();
        desk.order(Order::Close(done), false);
        assert_eq!(closed.recv(), Ok(()));
        std::fs::remove_file(path).expect("it is there");
    }

    /// Who may write and finds the clerk at it has nobody else to do it, and the clerk rests for a minute.
    #[test]
    fn what_is_left_while_the_clerk_keeps_house_is_not_slept_over() {
        let path = std::env::temp_dir().join(format!("ai-proxy-{}-desk.db", std::process::id()));
        let mut writer = Writer::new(path.clone(), Durability::Normal, Arc::default(), Arc::new(Metrics::new(&[], &[])));
        assert_eq!(writer.prove(), Ok(()));
        let other = rusqlite::Connection::open(&path).expect("a file");
        other.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
        // Only a clerk for whom all is quiet rests for long.
        thread::sleep(QUIET);
        let desk = Desk::open(writer).expect("a thread");
        while desk.writer.try_lock().is_ok() {
            thread::yield_now();
        }
        let (done, answer) = oneshot::channel();
        desk.order(Order::Probe(done), true);
        drop(other);
        assert_eq!(answer.recv_timeout(Duration::from_secs(20)), Ok(true));
        let (done, closed) = oneshot::channel();
        desk.order(Order::Close(done), false);
        assert_eq!(closed.recv(), Ok(()));
        std::fs::remove_file(path).expect("it is there");
    }
}
