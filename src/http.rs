//! The door to HTTP clients, and the only place that names tiny_http: listens and accepts. Knows nothing of what requests
//! mean.
//!
//! tiny_http accepts clients and closes their connections. What they send is read past its parser, which has no
//! limits, by `connection` and the pure rules of `head` and `chunked`; `answer` is the way back.

mod answer;
mod chunked;
mod connection;
mod head;

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::sockopt;
use tiny_http::{Server, SslContextWrap};

use crate::config::{self, Config};
use crate::error::StartError;
use crate::kernel;
use crate::lock::{lock, wait_while};
pub use answer::{Reply, Responder, StreamWriter, is_gone};
pub use connection::{Call, Connection, Turn};
pub use head::Head;

/// The listening socket and the connections that came from it.
pub struct Listener {
    listener: tiny_http::Listener,
    ssl: SslContextWrap,
    /// What clients connect to.
    pub local: SocketAddr,
    pub connections: Arc<Connections>,
    max_connections: usize,
}

/// The open connections.
#[derive(Default)]
pub struct Connections {
    /// By their inodes.
    sockets: Mutex<HashMap<u64, Weak<TcpStream>>>,
    room: Condvar,
    is_shut: AtomicBool,
    /// For requests that bring no id.
    ids: (RandomState, AtomicU64),
}

impl Connections {
    /// How many are open now.
    pub fn count(&self) -> usize {
        lock(&self.sockets).len()
    }

    /// Shuts all of them. For reading: to whoever waits for a client or watches one it has gone, but it can still be
    /// answered. For both: whoever waits until a client takes its answer waits no longer.
    pub fn shut(&self, how: Shutdown) {
        self.is_shut.store(true, Ordering::SeqCst);
        lock(&self.sockets).values().filter_map(Weak::upgrade).for_each(|socket| drop(socket.shutdown(how)));
    }

    fn new_id(&self) -> String {
        let mut hasher = self.ids.0.build_hasher();
        hasher.write_u64(self.ids.1.fetch_add(1, Ordering::Relaxed));
        format!("{:016x}", hasher.finish())
    }

    /// They were shut: clients that seem to have gone may be there.
    pub fn were_shut(&self) -> bool {
        self.is_shut.load(Ordering::SeqCst)
    }
}

/// Takes a connection off the list when everything of it is closed: a socket that is open and not on the
/// list is taken for the one that was just accepted.
pub struct Listed {
    connections: Arc<Connections>,
    inode: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        lock(&self.connections.sockets).remove(&self.inode);
        self.connections.room.notify_one();
    }
}

impl Listener {
    /// Listens on the configured address. Errs with one line when it is taken or not ours.
    pub fn bind(config: &Config) -> Result<Listener, StartError> {
        let wanted = SocketAddr::new(config.host, config.port);
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::AddrInUse => {
                StartError::machine(format!("cannot listen on {wanted}: the port is taken; stop the other program or set PORT"))
            }
            _ => StartError::machine(format!("cannot listen on {wanted}: {e}; check HOST and PORT")),
        };
        let listener = TcpListener::bind(wanted).map_err(failed)?;
        prepare(&listener).map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        let ssl = SslContextWrap::build_ssl_capabilities(None).map_err(|e| StartError::machine(e.to_string()))?;
        Ok(Listener {
            listener: listener.into(),
            ssl,
            local,
            connections: Arc::default(),
            max_connections: config.max_connections,
        })
    }

    /// Waits for the next client, and for room where as many connections are open as may be. `None`: there was none for a
    /// moment, or `stop` has something to read. Running out of descriptors is an error to wait out.
    pub fn accept(&self, stop: &UnixStream) -> io::Result<Option<Box<Connection>>> {
        const TICK: Duration = Duration::from_millis(100);
        let is_full = |live: &mut HashMap<_, _>| live.len() >= self.max_connections;
        if wait_while(&self.connections.room, lock(&self.connections.sockets), TICK, is_full).is_none() {
            return Ok(None);
        }
        let mut ready = [PollFd::new(&self.listener, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        kernel::poll(&mut ready, None)?;
        if ready[0].revents().is_empty() || !ready[1].revents().is_empty() {
            return Ok(None);
        }
        let lowest = self.spare_descriptors()?;
        // The library unwraps where its second descriptor fails; we saw to it that there are enough, but
        // another thread may have been faster.
        let accepted = catch_unwind(AssertUnwindSafe(|| Server::accept_connection(&self.listener, &self.ssl)))
            .unwrap_or_else(|_| Err(io::Error::other("out of file descriptors in the midst of accepting")));
        let client = match accepted {
            Ok(Some(client)) => client,
            Ok(None) => return Ok(None),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut live = lock(&self.connections.sockets);
        let Some((stream, inode, window)) = kernel::adopt_accepted(lowest, self.local, |inode| live.contains_key(&inode)) else {
            log::warn!("a client was accepted and its socket not found, as where descriptors run out; it is dropped");
            return Ok(None);
        };
        let stream = Arc::new(stream);
        live.insert(inode, Arc::downgrade(&stream));
        drop(live);
        let peer = stream.peer_addr().unwrap_or(self.local);
        let listed = Arc::new(Listed { connections: Arc::clone(&self.connections), inode });
        Ok(Some(Box::new(Connection::new(stream, peer, window, Box::new(client), listed))))
    }

    /// Errs unless the three descriptors that a connection takes are free; else the lowest of them.
    fn spare_descriptors(&self) -> io::Result<RawFd> {
        let spare = || rustix::io::fcntl_dupfd_cloexec(&self.listener, 0);
        let three = [spare()?, spare()?, spare()?];
        Ok(three[0].as_raw_fd())
    }
}

/// Options that accepted sockets inherit from the listener (Linux).
fn prepare(listener: &TcpListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    // std asks for a backlog of 128; a burst of new clients is larger.
    rustix::net::listen(listener, 4096)?;
    // Without it an answer waits 40 ms for the client's delayed ACK.
    sockopt::set_tcp_nodelay(listener, true)?;
    sockopt::set_socket_timeout(listener, sockopt::Timeout::Recv, Some(config::CLIENT_STALL))?;
    sockopt::set_socket_timeout(listener, sockopt::Timeout::Send, Some(config::CLIENT_STALL))?;
    // An urgent byte is a byte of the request like any other (RFC 6093, section 6).
    sockopt::set_socket_oobinline(listener, true)?;
    sockopt::set_socket_keepalive(listener, true)?;
    sockopt::set_tcp_keepidle(listener, config::KEEP_ALIVE)?;
    sockopt::set_tcp_user_timeout(listener, config::CLIENT_STALL.as_millis() as u32)?;
    Ok(())
}

/// Waits until something of `flags` is true of `fd`; false: the time came first.
fn wait(fd: &impl AsFd, flags: PollFlags, until: Instant) -> io::Result<bool> {
    kernel::poll(&mut [PollFd::new(fd, flags)], Some(until))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only who has them set can tell: a delay of 40 ms, and connections of clients that vanished.
    #[test]
    fn accepted_sockets_have_the_listeners_options() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        prepare(&listener).expect("prepared");
        let _client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        wait(&listener, PollFlags::IN, Instant::now() + config::CLIENT_STALL).expect("it comes");
        let (accepted, _) = listener.accept().expect("it is there");
        assert_eq!((sockopt::tcp_nodelay(&accepted), sockopt::socket_keepalive(&accepted)), (Ok(true), Ok(true)));
        assert_eq!(sockopt::tcp_keepidle(&accepted), Ok(config::KEEP_ALIVE));
        assert_eq!(sockopt::tcp_user_timeout(&accepted), Ok(config::CLIENT_STALL.as_millis() as u32));
        assert_eq!(sockopt::socket_timeout(&accepted, sockopt::Timeout::Recv), Ok(Some(config::CLIENT_STALL)));
        assert_eq!(sockopt::socket_timeout(&accepted, sockopt::Timeout::Send), Ok(Some(config::CLIENT_STALL)));
    }
}
