//! What both ends of the load share: one clock, waiting for many sockets, and as much HTTP as they speak.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

/// Nanoseconds since the first call: upstream and clients live in one process and compare these.
pub fn now() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_nanos() as u64
}

/// Waits for sockets that can be read. One that is closed leaves by itself.
pub struct Epoll {
    own: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Epoll {
    pub fn new() -> Epoll {
        Epoll { own: epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll"), events: Vec::with_capacity(1024) }
    }

    pub fn add(&self, source: impl AsFd, id: u64) {
        let id = epoll::EventData::new_u64(id);
        epoll::add(&self.own, source, id, epoll::EventFlags::IN).expect("epoll takes a socket");
    }

    /// The ids of the sockets that can be read; none where the time `until` comes first.
    pub fn wait(&mut self, until: Option<u64>) -> Vec<u64> {
        let left = until.map(|until| Duration::from_nanos(until.saturating_sub(now())));
        let left = left.map(|left| Timespec::try_from(left).expect("a short time"));
        self.events.clear();
        // A wait that a signal interrupts is one without events.
        let _ = epoll::wait(&self.own, spare_capacity(&mut self.events), left.as_ref());
        self.events.iter().map(|event| event.data.u64()).collect()
    }
}

/// The length of the head that these bytes begin with, once it is complete, and of what follows it, which is
/// `None` where that comes in chunks.
pub fn head(bytes: &[u8]) -> Option<(usize, Option<usize>)> {
    let len = find(bytes, b"\r\n\r\n")? + 4;
    let mut body = Some(0);
    for line in bytes[..len].split(|b| *b == b'\n') {
        let Some(colon) = line.iter().position(|b| *b == b':') else { continue };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if name.eq_ignore_ascii_case(b"content-length") {
            body = std::str::from_utf8(value).ok().and_then(|value| value.trim().parse().ok());
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            body = None;
        }
    }
    Some((len, body))
}

/// Where `needle` stands first.
pub fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}
