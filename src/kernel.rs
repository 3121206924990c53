//! What only the kernel knows or does, and neither std nor rustix offers: the descriptor of a socket that
//! the HTTP library keeps to itself, how much was received on it, memory of a stack that is not in use.
//! The only `unsafe` code of the program; knows no HTTP.
//!
//! Why the sockets: the library's parser has no limits, and its connection type does not let go of the
//! socket. A second descriptor for the same socket lets us look at what has arrived (`MSG_PEEK`)
//! before the library reads it.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, RawFd};

/// A second descriptor for the connection that was accepted last: `lowest` was the lowest free
/// descriptor just before, `local` is the listener's address, and `known` tells which sockets (by
/// their cookie, `SO_COOKIE`) were there already. `None` where it is not found.
///
/// The kernel hands out the lowest free number, so the first look finds it, unless another thread took
/// that number or freed a lower one in between.
pub fn adopt_accepted(lowest: RawFd, local: SocketAddr, known: impl Fn(u64) -> bool) -> Option<(TcpStream, u64)> {
    let (near, below) = (lowest..lowest.saturating_add(256), 0..lowest);
    near.chain(below).find_map(|number| adopt(number, local, &known))
}

fn adopt(number: RawFd, local: SocketAddr, known: &impl Fn(u64) -> bool) -> Option<(TcpStream, u64)> {
    // SAFETY: the number may be free, or belong to anything in this process. It is borrowed for this
    // call alone, which fails on a free number and changes nothing on a wrong one; the result owns a
    // descriptor of its own.
    let there = unsafe { BorrowedFd::borrow_raw(number) };
    // Asked before it is copied: closing the copy of a file's descriptor would drop all locks that this
    // process holds on the file (fcntl(2)), and SQLite's are such.
    let cookie = new_client(there, local, known)?;
    let copy = rustix::io::fcntl_dupfd_cloexec(there, 0).ok()?;
    if rustix::net::sockopt::socket_cookie(&copy) != Ok(cookie) {
        // The number changed hands in between. It may be a file's now, so the copy is never closed.
        let _ = copy.into_raw_fd();
        return None;
    }
    Some((TcpStream::from(copy), cookie))
}

/// The cookie of a client's socket that is not known yet.
fn new_client(there: BorrowedFd, local: SocketAddr, known: &impl Fn(u64) -> bool) -> Option<u64> {
    if rustix::net::sockopt::socket_acceptconn(there) != Ok(false) {
        return None;
    }
    // Not asked for: the peer, since a client that reset the connection has none any more.
    let address: SocketAddr = rustix::net::getsockname(there).ok()?.try_into().ok()?;
    let cookie = rustix::net::sockopt::socket_cookie(there).ok().filter(|_| address.port() == local.port())?;
    // One that is about to be closed may be off the list already, but was sent an answer.
    (!known(cookie) && counts(&there).ok()?.is_unused).then_some(cookie)
}

/// What the kernel counts of a connection.
#[derive(Clone, Copy)]
pub struct Counts {
    /// Bytes received since it was made, read by anybody or not.
    pub received: u64,
    /// The peer has taken all that was sent.
    pub is_idle: bool,
    /// Nothing was ever sent on it.
    pub is_unused: bool,
}

/// The counts of this connection (`TCP_INFO`, tcp(7)).
pub fn counts(stream: &impl AsFd) -> io::Result<Counts> {
    // SAFETY: tcp_info is plain numbers, for which all zeros is a value; the kernel writes at most
    // `len` bytes into it.
    let info = unsafe {
        let mut info: libc::tcp_info = std::mem::zeroed();
        let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
        let place = (&raw mut info).cast();
        if libc::getsockopt(stream.as_fd().as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut len) != 0 {
            return Err(io::Error::last_os_error());
        }
        info
    };
    // The peer's FIN takes a place in the sequence numbers and so in this count.
    const CLOSE_WAIT: u8 = 8;
    let received = info.tcpi_bytes_received - u64::from(info.tcpi_state == CLOSE_WAIT);
    let is_idle = info.tcpi_unacked == 0 && info.tcpi_notsent_bytes == 0;
    Ok(Counts { received, is_idle, is_unused: info.tcpi_bytes_sent == 0 })
}

/// Makes the socket readable only when at least `bytes` wait in it (`SO_RCVLOWAT`, socket(7)), so that
/// waiting for more than has been looked at does not spin.
pub fn readable_from(stream: &TcpStream, bytes: usize) -> io::Result<()> {
    let bytes = bytes.min(libc::c_int::MAX as usize) as libc::c_int;
    // SAFETY: the kernel reads one c_int at the given place.
    let result = unsafe {
        let (place, len) = ((&raw const bytes).cast(), size_of::<libc::c_int>() as libc::socklen_t);
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, place, len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives the memory of this thread's stack below its present depth back to the system, but for a little.
/// A call of the LLM begins 24 KiB deep in ureq and then, as a stream, waits in shallow water for
/// minutes: with 2,000 streams that is 48 of 107 MiB.
pub fn forget_unused_stack() {
    const KEEP: usize = 4 * 1024;
    let here = 0_u8;
    let depth = (&raw const here).addr();
    // SAFETY: the attributes are filled in by the first call and destroyed after the second. What is given
    // back is this thread's own stack, from its lowest address to some way below the deepest frame, where
    // nothing lives; if it is used again the kernel gives zeroed pages.
    unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        if libc::pthread_getattr_np(libc::pthread_self(), &raw mut attributes) != 0 {
            return;
        }
        let (mut lowest, mut size) = (std::ptr::null_mut(), 0);
        if libc::pthread_attr_getstack(&raw const attributes, &raw mut lowest, &raw mut size) == 0 {
            let unused = depth.saturating_sub(KEEP + lowest.addr()) & !(4096 - 1);
            if unused > 0 && unused < size {
                libc::madvise(lowest, unused, libc::MADV_DONTNEED);
            }
        }
        libc::pthread_attr_destroy(&raw mut attributes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    #[test]
    fn received_counts_bytes_read_and_unread_but_not_the_end() {
        let received = |stream: &TcpStream| counts(stream).expect("TCP_INFO").received;
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (mut server, _) = listener.accept().expect("accepted");
        client.write_all(b"12345").expect("sent");
        server.read_exact(&mut [0; 2]).expect("read");
        assert_eq!(received(&server), 5);
        drop(client);
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).expect("read");
        assert_eq!(received(&server), 5);
    }

    #[test]
    fn who_has_not_taken_what_was_sent_is_not_idle() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (mut server, _) = listener.accept().expect("accepted");
        assert!(counts(&server).expect("TCP_INFO").is_idle);
        server.set_nonblocking(true).expect("nonblocking");
        let mut sent = 0;
        while let Ok(written) = server.write(&[0; 4096]) {
            sent += written;
        }
        assert!(!counts(&server).expect("TCP_INFO").is_idle);
        client.read_exact(&mut vec![0; sent]).expect("read");
        while !counts(&server).expect("TCP_INFO").is_idle {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_stack_goes_on_after_its_unused_part_is_forgotten() {
        fn deep(levels: u64) -> u64 {
            let filled = std::hint::black_box([levels; 128]);
            if levels == 0 { 0 } else { filled[7] + deep(levels - 1) }
        }
        let kept = std::hint::black_box([7_u64; 64]);
        let before = deep(100);
        forget_unused_stack();
        assert_eq!((deep(100), kept), (before, [7; 64]));
    }

    #[test]
    fn the_accepted_socket_is_found_among_others() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let local = listener.local_addr().expect("bound");
        let lowest = rustix::io::fcntl_dupfd_cloexec(&listener, 0).expect("a descriptor").as_raw_fd();
        let _first = TcpStream::connect(local).expect("connected");
        let (one, _) = listener.accept().expect("accepted");
        let cookie = rustix::net::sockopt::socket_cookie(&one).expect("a cookie");
        let second = TcpStream::connect(local).expect("connected");
        let (_two, _) = listener.accept().expect("accepted");
        let (found, _) = adopt_accepted(lowest.min(one.as_raw_fd()), local, |c| c == cookie).expect("found");
        assert_eq!(found.peer_addr().ok(), second.local_addr().ok());
        (&one).write_all(b"answer").expect("sent");
        let (found, _) = adopt_accepted(lowest.min(one.as_raw_fd()), local, |_| false).expect("found");
        assert_eq!(found.peer_addr().ok(), second.local_addr().ok(), "not one that was answered");
    }
}
