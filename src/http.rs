//! The door to HTTP clients, and the only place that names tiny_http: listens, accepts, reads requests
//! within limits. Knows nothing of what requests mean.
//!
//! tiny_http accepts clients and closes their connections. What they send is read past its parser, which has no
//! limits, by the pure rules of `head` and `chunked`; `answer` is the way back.

mod answer;
mod chunked;
mod head;

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, sockopt};
use tiny_http::{Server, SslContextWrap};

use crate::config::{self, Config};
use crate::error::{ApiError, Code, StartError, is_sane_id};
use crate::kernel;
use crate::lock::{lock, wait_while};
use answer::Answers;
pub use answer::{Reply, Responder, StreamWriter, is_gone};
use chunked::{Decoder, too_large};
pub use head::Head;
use head::{Framing, MAX_HEAD};

/// The first read of a request has room for so many bytes; only larger ones make it grow. What is no larger than 1,032 glibc
/// keeps for the thread that freed it: 2 MiB where 2,000 streams end.
const FIRST_READ: usize = 1040;
/// And each read of a body for at least so many.
const PIECE: usize = 16 * 1024;

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

    /// Waits for the next client, at most a second, and for room where as many connections are open as
    /// may be. `None`: none came, or `stop` has something to read. Running out of descriptors is an error
    /// to wait out.
    pub fn accept(&self, stop: &UnixStream) -> io::Result<Option<Box<Connection>>> {
        const TICK: Duration = Duration::from_millis(100);
        const PATIENCE: Duration = Duration::from_secs(1);
        let is_full = |live: &mut HashMap<_, _>| live.len() >= self.max_connections;
        if wait_while(&self.connections.room, lock(&self.connections.sockets), TICK, is_full).is_none() {
            return Ok(None);
        }
        let mut ready = [PollFd::new(&self.listener, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        kernel::poll(&mut ready, Some(Instant::now() + PATIENCE))?;
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
        let Some((stream, inode)) = kernel::adopt_accepted(lowest, self.local, |inode| live.contains_key(&inode)) else {
            log::warn!("a client was accepted and its socket not found, as where descriptors run out; it is dropped");
            return Ok(None);
        };
        let stream = Arc::new(stream);
        live.insert(inode, Arc::downgrade(&stream));
        drop(live);
        let peer = stream.peer_addr().unwrap_or(self.local);
        let listed = Arc::new(Listed { connections: Arc::clone(&self.connections), inode });
        Ok(Some(Box::new(Connection {
            stream,
            peer,
            patience: config::CLIENT_STALL,
            unparsed: Vec::new(),
            passed_over: false,
            closing: false,
            owed: None,
            answers: Arc::default(),
            _client: Box::new(client),
            listed,
        })))
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

/// One client's connection: an HTTP/1.x server's side of it.
pub struct Connection {
    stream: Arc<TcpStream>,
    peer: SocketAddr,
    /// How long a read waits, as the socket was told.
    patience: Duration,
    /// Bytes that were received and belong to the next request, or to the body that is being read.
    unparsed: Vec<u8>,
    /// The empty line before a head was skipped.
    passed_over: bool,
    /// The last answer says that no other follows.
    closing: bool,
    /// The last request was not read to its end: its client may still be sending, so many bytes of a body where it said
    /// how many.
    owed: Option<u64>,
    answers: Arc<Answers>,
    /// The library's side, whose type it keeps to itself: it closes the connection when it goes.
    _client: Box<dyn Send>,
    /// Last, so that the connection is listed for as long as any part of it is open.
    listed: Arc<Listed>,
}

/// A request as it came in, or as far as it came in. `A` is what admitting it found out.
pub struct Call<A> {
    /// When the request's first byte was there.
    pub started: Instant,
    pub peer: SocketAddr,
    /// The client's own `X-Request-Id` where it is sane, else one of ours.
    pub id: String,
    /// The id is the client's own.
    pub own_id: bool,
    /// `None` where the head broke a rule.
    pub head: Option<Head>,
    /// `None` where nothing is known.
    pub admitted: Option<A>,
    /// The whole body, or why there is no use in going on.
    pub body: Result<Vec<u8>, ApiError>,
    /// The right to answer it.
    pub responder: Responder,
}

/// What a connection brought.
pub enum Turn<A> {
    /// A request; the next one is read when it is answered.
    Call(Box<Call<A>>),
    /// No request, or no whole one where only such is wanted, for as long as was to be waited.
    Quiet,
    /// The connection is at its end.
    Over,
}

impl Connection {
    /// Waits for the next request, at most `KEEP_ALIVE` for its first byte; or for as long as it is to `stay`, for one that
    /// is there as a whole then. `admit` judges it by its head, before its body is read: what is known of it, and of how many
    /// bytes its body may be, where it is let in.
    pub fn next_call<A>(
        &mut self,
        admit: impl FnOnce(&Head) -> (Option<A>, Result<usize, ApiError>),
        stay: Option<Duration>,
    ) -> Turn<A> {
        let at_once = stay.is_some();
        if self.closing || self.answers.is_broken() {
            return Turn::Over;
        }
        let mut parsed = self.parse();
        // Who began a request has the time that a head has, but for a worker, which waits for none.
        let is_quiet = matches!(parsed, Ok(None)) && (self.unparsed.is_empty() || at_once);
        let mut is_over = false;
        while is_quiet && !is_over {
            match self.receive(stay.unwrap_or(config::KEEP_ALIVE)) {
                Ok(Some(1..)) => parsed = self.parse(),
                Ok(None) => return Turn::Quiet,
                _ => is_over = true,
            }
            // An empty line alone begins no request.
            if at_once || !self.unparsed.is_empty() {
                break;
            }
        }
        // One request at a time: only a client that pipelines waits here. And the connection does not end before its last
        // answer, which may still wait for its commit.
        if self.answers.is_pending() {
            if at_once {
                return Turn::Quiet;
            }
            self.answers.wait(Duration::MAX);
        }
        if is_over || self.answers.is_broken() {
            return Turn::Over;
        }
        let started = Instant::now();
        if at_once && !self.is_whole(&parsed) {
            return Turn::Quiet;
        }
        self.owed = Some(0);
        let Some(next) = self.next_head(parsed, started + config::HEADER_TIMEOUT) else { return Turn::Over };
        self.passed_over = false;
        let (head, admitted, body, keep) = match next {
            Ok(mut head) => match head.fault.take() {
                Some(e) => (Some(head), None, Err(e), false),
                None => {
                    let (admitted, verdict) = admit(&head);
                    let (body, keep) = self.body(&head, verdict);
                    self.owed = (!keep).then_some(if let Framing::Length(length) = head.framing { length } else { 0 });
                    let keep = keep && !head.close;
                    (Some(head), admitted, body, keep)
                }
            },
            Err(e) => (None, None, Err(e), false),
        };
        self.closing = !keep;
        if self.unparsed.is_empty() {
            // Streams are many and long, and this is not needed before the next request.
            self.unparsed = Vec::new();
        }
        let own_id = head.as_ref().and_then(|head| head.field("x-request-id")).filter(|id| is_sane_id(id)).map(str::to_string);
        let id = own_id.clone().unwrap_or_else(|| self.listed.connections.new_id());
        let responder = Responder::new(self, head.as_ref());
        Turn::Call(Box::new(Call { started, peer: self.peer, id, own_id: own_id.is_some(), head, admitted, body, responder }))
    }

    /// The head that was received. One empty line before it is passed over (RFC 9112, section 2.2): some clients end a
    /// body with one.
    fn parse(&mut self) -> Result<Option<Head>, ApiError> {
        if !self.passed_over && self.unparsed.starts_with(b"\r\n") {
            self.unparsed.drain(..2);
            self.passed_over = true;
        }
        Head::parse(&self.unparsed)
    }

    /// Reading the next request, or refusing it, will wait for nothing more of it.
    fn is_whole(&self, parsed: &Result<Option<Head>, ApiError>) -> bool {
        match parsed {
            Ok(None) => false,
            Ok(Some(head)) if head.fault.is_none() => {
                matches!(head.framing, Framing::Length(length) if (self.unparsed.len() - head.len()) as u64 >= length)
            }
            _ => true,
        }
    }

    /// The last request is answered, well or not.
    pub fn is_answered(&self) -> bool {
        !self.answers.is_pending()
    }

    /// Waits until it is, but no longer than this.
    pub fn await_answer(&self, time: Duration) {
        self.answers.wait(time);
    }

    /// Ends the connection without waiting for anything.
    pub fn cut(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Closing will take a moment, since the client may still be sending.
    pub fn lingers(&self) -> bool {
        self.owed.is_some() || rustix::io::ioctl_fionread(&self.stream).is_ok_and(|unread| unread > 0)
    }

    /// Takes what arrives within this time; 0: the client will send no more, `None`: the time came first. The socket
    /// itself waits: asking it first whether there is anything would be a system call more for each request.
    fn receive(&mut self, patience: Duration) -> io::Result<Option<usize>> {
        let mut flags = RecvFlags::DONTWAIT;
        if !patience.is_zero() {
            self.be_patient_for(patience)?;
            flags = RecvFlags::empty();
        }
        let room = self.unparsed.len().clamp(FIRST_READ, MAX_HEAD);
        self.unparsed.reserve_exact(room);
        let began = Instant::now();
        loop {
            match rustix::net::recv(&self.stream, spare_capacity(&mut self.unparsed), flags) {
                Ok((_, received)) => return Ok(Some(received)),
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                // Who is stopped and goes on (SIGSTOP, a debugger, a freezer) waits anew, but not for ever.
                Err(rustix::io::Errno::INTR) if began.elapsed() >= patience => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// From now on a read of the socket waits so long.
    fn be_patient_for(&mut self, patience: Duration) -> io::Result<()> {
        if self.patience != patience {
            sockopt::set_socket_timeout(&self.stream, sockopt::Timeout::Recv, Some(patience))?;
            self.patience = patience;
        }
        Ok(())
    }

    /// Reads on until there is a whole head. `None`: the client has gone, and nothing is said.
    fn next_head(&mut self, mut parsed: Result<Option<Head>, ApiError>, deadline: Instant) -> Option<Result<Head, ApiError>> {
        loop {
            if let Some(next) = parsed.transpose() {
                return Some(next);
            }
            match self.receive(deadline.saturating_duration_since(Instant::now())) {
                Ok(Some(1..)) => parsed = self.parse(),
                Ok(None) => {
                    let text = format!("the request's head was not complete within {} s", config::HEADER_TIMEOUT.as_secs());
                    return Some(Err(ApiError::new(Code::REQUEST_TIMEOUT, text)));
                }
                _ => return None,
            }
        }
    }

    /// The body of a request whose head was judged; true: what follows is the next request.
    fn body(&mut self, head: &Head, verdict: Result<usize, ApiError>) -> (Result<Vec<u8>, ApiError>, bool) {
        let length = match (head.framing, &verdict) {
            (Framing::Length(length), Ok(most)) if length > *most as u64 => return (Err(too_large(*most)), false),
            (Framing::Length(length), _) => Some(length as usize),
            (Framing::Chunked, _) => None,
        };
        let end = length.map(|length| head.len().saturating_add(length));
        if let Some(end) = end.filter(|end| *end <= self.unparsed.len()) {
            // Most requests are all there, and then also one that is refused leaves the next one readable.
            let body = verdict.map(|_| self.unparsed[head.len()..end].to_vec());
            self.unparsed.drain(..end);
            return (body, true);
        }
        let body = verdict.and_then(|most| {
            self.unparsed.drain(..head.len());
            if head.expects_continue {
                (&*self.stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n").map_err(|_| ApiError::client_gone())?;
            }
            match length {
                Some(length) => self.read_on(length),
                None => self.read_chunked(most),
            }
        });
        let keep = body.is_ok();
        if !keep {
            self.unparsed.clear();
        }
        (body, keep)
    }

    /// Reads the rest of a body of a known length.
    fn read_on(&mut self, length: usize) -> Result<Vec<u8>, ApiError> {
        let began = Instant::now();
        // An announced length is not believed before it has come.
        while self.unparsed.len() < length {
            self.read_piece(length - self.unparsed.len(), began, self.unparsed.len())?;
        }
        let rest = self.unparsed.split_off(length);
        Ok(std::mem::replace(&mut self.unparsed, rest))
    }

    /// Reads a chunked body.
    fn read_chunked(&mut self, most: usize) -> Result<Vec<u8>, ApiError> {
        let (began, mut received) = (Instant::now(), self.unparsed.len());
        let mut decoder = Decoder::new(most);
        loop {
            if let Some(rest) = decoder.push(&self.unparsed)? {
                self.unparsed = rest.to_vec();
                return Ok(decoder.into_body());
            }
            self.unparsed.clear();
            received += self.read_piece(PIECE, began, received)?;
        }
    }

    /// Takes the next bytes of a body, of which so many are missing and so many came since it began; how many.
    fn read_piece(&mut self, missing: usize, began: Instant, received: usize) -> Result<usize, ApiError> {
        let timeout = |text: String| Err(ApiError::new(Code::REQUEST_TIMEOUT, text));
        // Of what follows the body no more comes along than one read of a head: the rest is left to the socket.
        if self.unparsed.capacity() - self.unparsed.len() < missing.min(PIECE) {
            self.unparsed.reserve_exact(missing.min(self.unparsed.len().max(PIECE)));
        }
        let read = match self.receive(config::CLIENT_STALL) {
            Ok(Some(read @ 1..)) => read,
            Ok(None) => return timeout(format!("nothing of the body came for {} s", config::CLIENT_STALL.as_secs())),
            _ => return Err(ApiError::client_gone()),
        };
        let allowed = config::BODY_TIME + Duration::from_secs((received / config::BODY_RATE) as u64);
        if began.elapsed() > allowed {
            return timeout(format!("the body was not complete within {} s, for what came of it", allowed.as_secs()));
        }
        Ok(read)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.lingers() {
            self.linger();
        }
    }
}

impl Connection {
    /// Closes so that the client can still read the last answer: what it keeps sending is thrown away
    /// for a moment, since closing over unread bytes would reset the connection (RFC 9112, section 9.6). Some clients send
    /// all of a body before they read: who said how large it is gets the time for that.
    // Not inlined: the library's side is closed below it, on a stack of which each stream's thread keeps what was used.
    #[inline(never)]
    fn linger(&self) {
        const LINGER: Duration = Duration::from_millis(500);
        const LINGER_BYTES: u64 = 4 << 20;
        const MOST_LINGER: Duration = Duration::from_secs(30);
        const MOST_LINGER_BYTES: u64 = 64 << 20;
        let owed = self.owed.filter(|owed| *owed <= MOST_LINGER_BYTES).unwrap_or(0);
        let until = Instant::now() + if owed > 0 { MOST_LINGER } else { LINGER };
        let (mut sink, mut thrown) = ([0; 4096], 0);
        let _ = self.stream.shutdown(Shutdown::Write);
        let more = || wait(&self.stream, PollFlags::IN, until.min(Instant::now() + LINGER)).is_ok_and(|there| there);
        while thrown < owed.max(LINGER_BYTES) && more() {
            match (&*self.stream).read(&mut sink) {
                Ok(n) if n > 0 => thrown += n as u64,
                _ => break,
            }
        }
    }
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
