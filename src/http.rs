//! The door to HTTP clients, and the only file that names tiny_http: listens, accepts, reads requests
//! within limits, writes answers and streams. Knows nothing of what requests mean.
//!
//! tiny_http parses and delimits; everything it has no limit for is looked at before it reads
//! (`Connection::next_head`), with the pure rules of `head`. Chunked bodies, which it takes too easily, are
//! read past it, from the same socket.

mod chunked;
mod head;

use std::borrow::Cow;
use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, sockopt};
use tiny_http::{Request, Server, SslContextWrap};

use crate::config::{self, Config};
use crate::error::{ApiError, Code, Header, StartError, is_sane_id};
use crate::kernel;
use chunked::Decoder;
pub use head::Head;
use head::{Framing, MAX_HEAD};

/// Bodies up to this size are read by the library together with the head, without asking us.
const EAGER_BODY: usize = 1024;
/// The first look at a request takes so many bytes; only larger heads make it grow.
const FIRST_LOOK: usize = 2048;
const LARGEST_LOOK: usize = MAX_HEAD + EAGER_BODY;

/// The listening socket and the connections that came from it.
pub struct Listener {
    listener: tiny_http::Listener,
    ssl: SslContextWrap,
    local: SocketAddr,
    live: Arc<Live>,
    max_connections: usize,
    max_body: usize,
}

/// The open connections, by their sockets' cookies.
#[derive(Default)]
struct Live {
    cookies: Mutex<HashSet<u64>>,
    room: Condvar,
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.cookies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a connection off the list when everything of it is closed: a socket that is open and not on the
/// list is taken for the one that was just accepted.
struct Listed {
    live: Arc<Live>,
    cookie: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.live.lock().remove(&self.cookie);
        self.live.room.notify_one();
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
            live: Arc::default(),
            max_connections: config.max_connections,
            max_body: config.max_body_bytes,
        })
    }

    /// The address that clients connect to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// A counter of open connections that outlives the listener.
    pub fn connections(&self) -> Connections {
        Connections(Arc::clone(&self.live))
    }

    /// Waits for the next client, at most a second, and for room where as many connections are open as
    /// may be. `None`: none came, or `stop` has something to read. Running out of descriptors is an error
    /// to wait out.
    pub fn accept(&self, stop: &UnixStream) -> io::Result<Option<Connection>> {
        const TICK: Duration = Duration::from_millis(100);
        const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
        {
            let live = self.live.lock();
            if live.len() >= self.max_connections {
                let (live, _) = self.live.room.wait_timeout(live, TICK).unwrap_or_else(PoisonError::into_inner);
                if live.len() >= self.max_connections {
                    return Ok(None);
                }
            }
        }
        let mut ready = [PollFd::new(&self.listener, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut ready, Some(&PATIENCE)) {
            Ok(_) | Err(rustix::io::Errno::INTR) if ready[0].revents().is_empty() || !ready[1].revents().is_empty() => {
                return Ok(None);
            }
            Ok(_) => {}
            Err(e) => return Err(e.into()),
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
        let mut live = self.live.lock();
        let Some((stream, cookie)) = kernel::adopt_accepted(lowest, self.local, |cookie| live.contains(&cookie)) else {
            log::error!("bug: an accepted socket was not found; its connection is dropped");
            return Ok(None);
        };
        live.insert(cookie);
        drop(live);
        let peer = stream.peer_addr().unwrap_or(self.local);
        let stream = Arc::new(stream);
        let listed = Arc::new(Listed { live: Arc::clone(&self.live), cookie });
        Ok(Some(Connection {
            client: Some(Box::new(client.map(Result::ok))),
            stream,
            peer,
            window: Vec::new(),
            ahead: 0,
            taken: 0,
            is_idle: false,
            max_body: self.max_body,
            closing: false,
            answers: Arc::default(),
            listed,
        }))
    }

    /// Errs unless the three descriptors that a connection takes are free; else the lowest of them.
    fn spare_descriptors(&self) -> io::Result<RawFd> {
        let spare = || rustix::io::fcntl_dupfd_cloexec(&self.listener, 0);
        let three = [spare()?, spare()?, spare()?];
        Ok(three[0].as_raw_fd())
    }
}

/// Counts the open connections.
#[derive(Clone)]
pub struct Connections(Arc<Live>);

impl Connections {
    /// How many are open now.
    pub fn open(&self) -> usize {
        self.0.lock().len()
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
    // An urgent byte that is not in line would be received without being read, and our counting goes astray.
    sockopt::set_socket_oobinline(listener, true)?;
    sockopt::set_socket_keepalive(listener, true)?;
    sockopt::set_tcp_keepidle(listener, config::KEEP_ALIVE)?;
    sockopt::set_tcp_user_timeout(listener, config::CLIENT_STALL.as_millis() as u32)?;
    Ok(())
}

/// Waits until something of `flags` is true of `fd`; false: the time came first.
fn wait(fd: &impl AsFd, flags: PollFlags, until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(fd, flags)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Requests as the library reads them, `None` for one that it could not.
type Requests = Box<dyn Iterator<Item = Option<Request>> + Send>;

/// One client's connection: an HTTP/1.x server's side of it.
pub struct Connection {
    /// The library's side, whose type it keeps to itself; `None` only while the connection is closed.
    client: Option<Requests>,
    /// The same socket, for looking ahead and for noticing that the client has gone.
    stream: Arc<TcpStream>,
    peer: SocketAddr,
    /// What is known of the bytes from the next request's first on.
    window: Vec<u8>,
    /// How many of the window's bytes the library has already in its own buffer (pipelining).
    ahead: usize,
    /// How many bytes the requests before the next one had.
    taken: u64,
    /// The client had taken all that was sent when its last request was read.
    is_idle: bool,
    max_body: usize,
    /// The last answer says that no other follows.
    closing: bool,
    answers: Arc<Answers>,
    listed: Arc<Listed>,
}

/// What became of a connection's answers.
#[derive(Default)]
struct Answers {
    /// One did not get through, or will never come.
    broken: AtomicBool,
    pending: Mutex<Pending>,
    answered: Condvar,
}

#[derive(Default)]
struct Pending {
    /// The last request is not answered yet: a worker goes on while the answer waits for its commit.
    is_pending: bool,
    is_awaited: bool,
}

impl Answers {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        let mut pending = self.lock();
        pending.is_pending = false;
        // Waking costs a system call, also where nobody waits.
        if std::mem::take(&mut pending.is_awaited) {
            self.answered.notify_all();
        }
    }

    fn wait(&self, time: Duration) {
        let mut pending = self.lock();
        if pending.is_pending {
            pending.is_awaited = true;
            let waiting = |pending: &mut Pending| pending.is_pending;
            drop(self.answered.wait_timeout_while(pending, time, waiting));
        }
    }
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

/// What was read of a request.
struct Seen<A> {
    head: Option<Head>,
    admitted: Option<A>,
    body: Result<Vec<u8>, ApiError>,
}

/// What the layer above decides about requests.
pub trait Site {
    /// What is known of a request that was admitted.
    type Admitted;
    /// Judges a request by its head, before its body is read: what is known of it, and whether it is let in.
    fn admit(&self, head: &Head) -> (Option<Self::Admitted>, Result<(), ApiError>);
    /// An id for a request that brought none.
    fn new_id(&self) -> String;
}

/// What a connection brought.
pub enum Turn<A> {
    /// A request, to be answered before the connection is asked for the next.
    Call(Box<Call<A>>),
    /// No request, or no whole one where only such is wanted, for as long as was to be waited.
    Quiet,
    /// The connection is at its end.
    Over,
}

/// How looking for the next request ended.
enum Next {
    Head(Head),
    Refused(ApiError),
    /// The client has gone, or was silent for too long between requests: nothing is said.
    Over,
}

impl Connection {
    /// Waits for the next request, at most so long for its first byte. `at_once`: only for one that is there
    /// as a whole then; of another nothing is taken.
    pub fn next_call<S: Site>(&mut self, site: &S, patience: Duration, at_once: bool) -> Turn<S::Admitted> {
        if self.closing || self.answers.broken.load(Ordering::Relaxed) {
            return Turn::Over;
        }
        if self.ahead == 0 {
            match self.wait_unread(1, Instant::now() + patience) {
                Ok(true) => {}
                Ok(false) => return Turn::Quiet,
                Err(_) => return Turn::Over,
            }
        }
        // One request at a time: only who does not wait for answers is made to wait here.
        while !self.is_answered() {
            if at_once {
                return Turn::Quiet;
            }
            self.await_answer(config::DATABASE_BUSY);
        }
        if self.answers.broken.load(Ordering::Relaxed) {
            return Turn::Over;
        }
        if self.look().is_err() {
            return Turn::Over;
        }
        let first_look = Head::parse(&self.window);
        if at_once && !self.is_whole(&first_look) {
            return Turn::Quiet;
        }
        let started = Instant::now();
        let head = match self.next_head(first_look, started + config::HEADER_TIMEOUT) {
            Next::Head(head) => head,
            Next::Refused(e) => {
                let seen = Seen { head: None, admitted: None, body: Err(e) };
                return self.call(site, Out::Socket, false, started, seen);
            }
            Next::Over => return Turn::Over,
        };
        let (admitted, verdict) = site.admit(&head);
        let mut body = verdict.and_then(|()| self.await_body(&head)).map(|()| Vec::new());
        if body.is_err() && !self.is_at_hand(&head) {
            // The library need not see a request whose body will not be read.
            return self.call(site, Out::Socket, false, started, Seen { head: Some(head), admitted, body });
        }
        if body.is_ok() && head.framing == Framing::Chunked {
            body = self.read_chunked(&head);
            return self.call(site, Out::Socket, false, started, Seen { head: Some(head), admitted, body });
        }
        let Some(Some(mut request)) = self.client.as_mut().and_then(Iterator::next) else {
            log::error!("the HTTP library did not read a head that broke no rule; the connection is closed");
            return Turn::Over;
        };
        if let (Ok(_), Framing::Length(length @ 1..)) = (&body, head.framing) {
            body = read_body(length, request.as_reader());
            if body.is_err() {
                // What is left of the body will not be read; without this the library would.
                let _ = self.stream.shutdown(Shutdown::Read);
            }
        }
        let whole = body.is_ok() || self.is_at_hand(&head);
        let keep = !head.close && whole && self.settle(&head);
        let out = Out::Library(request.into_writer());
        self.call(site, out, keep, started, Seen { head: Some(head), admitted, body })
    }

    /// The request, with the right to answer it; `keep`: another may follow.
    fn call<S: Site>(&mut self, site: &S, out: Out, keep: bool, started: Instant, seen: Seen<S::Admitted>) -> Turn<S::Admitted> {
        let Seen { head, admitted, body } = seen;
        self.closing = !keep;
        let own_id = head.as_ref().and_then(request_id);
        let responder = Responder {
            out,
            stream: Arc::clone(&self.stream),
            http10: head.as_ref().is_some_and(|head| head.http10),
            head_only: head.as_ref().is_some_and(|head| head.method() == "HEAD"),
            keep,
            is_idle: keep && self.is_idle,
            id: own_id.clone().unwrap_or_else(|| site.new_id()),
            is_used: false,
            answers: Arc::clone(&self.answers),
            _listed: Arc::clone(&self.listed),
        };
        self.answers.lock().is_pending = true;
        let (id, own_id) = (responder.id.clone(), own_id.is_some());
        Turn::Call(Box::new(Call { started, peer: self.peer, id, own_id, head, admitted, body, responder }))
    }

    /// Reading the next request, or refusing it, will wait for nothing more of it.
    fn is_whole(&self, looked: &Result<Option<Head>, ApiError>) -> bool {
        match looked {
            Ok(None) => self.window.is_empty(),
            Ok(Some(head)) => match head.framing {
                Framing::Length(length) => (self.window.len() - head.len()) as u64 >= length,
                Framing::Chunked => false,
            },
            Err(_) => true,
        }
    }

    /// The last request is answered, well or not.
    pub fn is_answered(&self) -> bool {
        !self.answers.lock().is_pending
    }

    /// Waits until it is, but no longer than this.
    pub fn await_answer(&self, time: Duration) {
        self.answers.wait(time);
    }

    /// Ends the connection without waiting for anything.
    pub fn cut(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Closing will take a moment, since the client is still sending.
    pub fn has_unread(&self) -> bool {
        rustix::io::ioctl_fionread(&self.stream).is_ok_and(|unread| unread > 0)
    }

    /// The body is small and all of it has been looked at, so the library reads it with the head.
    fn is_at_hand(&self, head: &Head) -> bool {
        match head.framing {
            Framing::Length(length) if is_eager(head, length) => self.window.len() >= head.len() + length as usize,
            _ => false,
        }
    }

    /// Looks on at the bytes that arrive until they are a whole head, without taking them away.
    fn next_head(&mut self, mut looked: Result<Option<Head>, ApiError>, deadline: Instant) -> Next {
        loop {
            match looked {
                Ok(Some(head)) => return Next::Head(head),
                Err(e) => return Next::Refused(e),
                Ok(None) if self.window.is_empty() => return Next::Over,
                Ok(None) => {}
            }
            match self.await_more(deadline) {
                Ok(true) => {}
                Ok(false) => {
                    return Next::Refused(ApiError::new(
                        Code::RequestTimeout,
                        format!("the request's head was not complete within {} s", config::HEADER_TIMEOUT.as_secs()),
                    ));
                }
                Err(_) => return Next::Over,
            }
            looked = Head::parse(&self.window);
        }
    }

    /// Refuses a body that is too large by its own word, and waits until a small one is there: the
    /// library reads it with the head and would answer by itself where it is late.
    fn await_body(&mut self, head: &Head) -> Result<(), ApiError> {
        let Framing::Length(length) = head.framing else { return Ok(()) };
        if length > self.max_body as u64 {
            return Err(too_large(self.max_body));
        }
        if !is_eager(head, length) {
            return Ok(());
        }
        while self.window.len() < head.len() + length as usize {
            match self.await_more(Instant::now() + config::CLIENT_STALL) {
                Ok(true) => {}
                Ok(false) => return Err(stalled()),
                Err(_) => return Err(client_gone()),
            }
        }
        Ok(())
    }

    /// Waits for bytes beyond the window and takes a look at them. False: the time came first. Errs when
    /// the client has gone and nothing more will come.
    fn await_more(&mut self, until: Instant) -> io::Result<bool> {
        let seen = self.window.len();
        while self.wait_unread(seen - self.ahead + 1, until)? {
            self.look()?;
            if self.window.len() > seen {
                return Ok(true);
            }
            if wait(&self.stream, PollFlags::RDHUP, Instant::now())? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // A receive window that is full counts as readable, however little was to be waited for.
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(false)
    }

    /// Waits until `bytes` are unread or the client has gone. False: the time came first.
    fn wait_unread(&self, bytes: usize, until: Instant) -> io::Result<bool> {
        if bytes == 1 {
            return wait(&self.stream, PollFlags::IN, until);
        }
        kernel::readable_from(&self.stream, bytes)?;
        let there = wait(&self.stream, PollFlags::IN, until);
        kernel::readable_from(&self.stream, 1)?;
        there
    }

    /// Fills the window with what has arrived, leaving it in the socket.
    fn look(&mut self) -> io::Result<()> {
        let mut size = self.window.capacity().clamp(FIRST_LOOK, LARGEST_LOOK);
        loop {
            self.window.truncate(self.ahead);
            self.window.reserve_exact(size);
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let seen = match rustix::net::recv(&self.stream, spare_capacity(&mut self.window), flags) {
                Ok((_, seen)) => seen,
                Err(rustix::io::Errno::AGAIN) => 0,
                Err(e) => return Err(e.into()),
            };
            if seen < size || size == LARGEST_LOOK {
                return Ok(());
            }
            size = (2 * size).min(LARGEST_LOOK);
        }
    }

    /// Reads a request with a chunked body past the library, which hears no more of this connection.
    fn read_chunked(&mut self, head: &Head) -> Result<Vec<u8>, ApiError> {
        let mut decoder = Decoder::new(self.max_body);
        let known = std::mem::take(&mut self.window);
        // What the library has already in its buffer will not come from the socket again.
        let (read_ahead, mut rest_of_head) = match known[..self.ahead].split_at_checked(head.len()) {
            Some((_, beyond)) => (beyond, 0),
            None => (&known[..0], head.len() - self.ahead),
        };
        let mut done = decoder.push(read_ahead)?;
        if head.expects_continue && !done && known.len() == head.len() {
            (&*self.stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n").map_err(|_| client_gone())?;
        }
        let mut buffer = vec![0; 8 * 1024];
        while !done {
            match (&*self.stream).read(&mut buffer) {
                Ok(0) => return Err(client_gone()),
                Ok(read) => {
                    let skipped = rest_of_head.min(read);
                    rest_of_head -= skipped;
                    done = decoder.push(&buffer[skipped..read])?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(not_read(&e)),
            }
        }
        Ok(decoder.into_body())
    }

    /// Bytes of this connection that the library has read, those of the requests before included. `None`
    /// where the client sends too fast to tell.
    fn received_by_library(&mut self) -> Option<u64> {
        let mut before = kernel::counts(&self.stream).ok()?;
        self.is_idle = before.is_idle;
        // Nothing came beyond the request, and nobody need ask what is unread.
        if before.received == self.taken {
            return Some(before.received);
        }
        // What arrives between two looks would count as read.
        for _ in 0..100 {
            let unread = rustix::io::ioctl_fionread(&self.stream).ok()?;
            let after = kernel::counts(&self.stream).ok()?;
            if before.received == after.received {
                return after.received.checked_sub(unread);
            }
            before = after;
        }
        None
    }

    /// After a request was read: learns how far the library read beyond it. False where it holds bytes
    /// that nobody has looked at; nothing may then be read as a request any more.
    fn settle(&mut self, head: &Head) -> bool {
        let Framing::Length(length) = head.framing else { return false };
        let size = head.len() + length as usize;
        self.taken += size as u64;
        let Some(received) = self.received_by_library() else { return false };
        self.ahead = received.saturating_sub(self.taken) as usize;
        if self.ahead == 0 {
            // Streams are many and long, and this is not needed before the next request.
            self.window = Vec::new();
            return true;
        }
        if self.window.len() < size + self.ahead {
            return false;
        }
        self.window.drain(..size);
        true
    }
}

impl Drop for Connection {
    /// Closes so that the client can still read the last answer: what it keeps sending is thrown away
    /// for a moment, since closing over unread bytes would reset the connection (RFC 9112, section 9.6).
    fn drop(&mut self) {
        const LINGER: Duration = Duration::from_millis(500);
        const LINGER_BYTES: usize = 4 << 20;
        if self.has_unread() {
            let until = Instant::now() + LINGER;
            let (mut sink, mut thrown) = ([0; 4096], 0);
            let _ = self.stream.shutdown(Shutdown::Write);
            while thrown < LINGER_BYTES && wait(&self.stream, PollFlags::IN, until).is_ok_and(|there| there) {
                match (&*self.stream).read(&mut sink) {
                    Ok(n) if n > 0 => thrown += n,
                    _ => break,
                }
            }
        }
        drop(self.client.take());
    }
}

/// Reads a body of a known length through the library.
fn read_body(length: u64, reader: &mut dyn Read) -> Result<Vec<u8>, ApiError> {
    let mut body = Vec::with_capacity(length as usize);
    match reader.take(length).read_to_end(&mut body) {
        Ok(read) if (read as u64) < length => Err(client_gone()),
        Ok(_) => Ok(body),
        Err(e) => Err(not_read(&e)),
    }
}

/// Why a body could not be read.
fn not_read(e: &io::Error) -> ApiError {
    match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => stalled(),
        _ => client_gone(),
    }
}

/// The library reads the body together with the head.
fn is_eager(head: &Head, length: u64) -> bool {
    length <= EAGER_BODY as u64 && !head.expects_continue && !head.upgrade
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(Code::BodyTooLarge, format!("the body is larger than {limit} bytes (MAX_BODY_BYTES)"))
}

fn stalled() -> ApiError {
    ApiError::new(Code::RequestTimeout, format!("nothing of the body came for {} s", config::CLIENT_STALL.as_secs()))
}

fn client_gone() -> ApiError {
    ApiError::new(Code::ClientGone, "the client went away")
}

/// The client's `X-Request-Id`, unless it could break a log line.
fn request_id(head: &Head) -> Option<String> {
    head.field("x-request-id").filter(|id| is_sane_id(id)).map(str::to_string)
}

/// An answer that is known as a whole.
pub struct Reply {
    pub status: u16,
    pub content_type: &'static str,
    /// Further header fields.
    pub headers: Vec<Header>,
    pub body: Cow<'static, [u8]>,
}

impl Reply {
    /// A JSON answer.
    pub fn json(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        Reply { status, content_type: "application/json", headers: Vec::new(), body: Cow::Owned(body.into()) }
    }
}

enum Out {
    Library(Box<dyn Write + Send>),
    /// For a request that the library has not seen.
    Socket,
}

/// The right to answer one request, once.
pub struct Responder {
    out: Out,
    stream: Arc<TcpStream>,
    http10: bool,
    head_only: bool,
    keep: bool,
    is_idle: bool,
    id: String,
    /// An answer was begun.
    is_used: bool,
    answers: Arc<Answers>,
    /// Last, so that the connection is listed for as long as any part of it is open.
    _listed: Arc<Listed>,
}

impl Drop for Responder {
    fn drop(&mut self) {
        // Without an answer the next one would be taken for it.
        if !self.is_used {
            self.answers.broken.store(true, Ordering::Relaxed);
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        self.answers.end();
    }
}

impl Responder {
    /// For tests: the right to answer on this socket.
    #[cfg(test)]
    pub fn on(stream: TcpStream) -> Responder {
        let (id, stream, answers) = ("test".to_string(), Arc::new(stream), Arc::default());
        let _listed = Arc::new(Listed { live: Arc::default(), cookie: 0 });
        Responder {
            out: Out::Socket,
            stream,
            http10: false,
            head_only: false,
            keep: true,
            is_idle: true,
            id,
            is_used: false,
            answers,
            _listed,
        }
    }

    /// The client's socket, to notice that it has gone.
    pub fn client(&self) -> Arc<TcpStream> {
        Arc::clone(&self.stream)
    }

    /// The client has hung up, as far as one can tell.
    pub fn is_client_gone(&self) -> bool {
        wait(&self.stream, PollFlags::RDHUP, Instant::now()).unwrap_or(true)
    }

    /// The client's socket has room for an answer of so many bytes, as far as one can tell.
    pub fn has_room(&self, bytes: usize) -> bool {
        const SMALL: usize = 32 * 1024;
        bytes <= SMALL && wait(&self.stream, PollFlags::OUT, Instant::now()).is_ok_and(|room| room)
    }

    /// An answer of about so many bytes will not wait for the client, and the connection will go on after it.
    pub fn takes_at_once(&self, bytes: usize) -> bool {
        // Half of the smallest send buffer there is by default (tcp_wmem, tcp(7)).
        const SMALL: usize = 8 * 1024;
        self.is_idle && bytes <= SMALL
    }

    /// The client had taken all that was sent before its request, and the connection will go on after it.
    pub fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// Sends the answer. Returns how many bytes of body went out; errs when the client did not take it.
    pub fn send(mut self, reply: &Reply) -> io::Result<u64> {
        // One write for most; what is large is not copied, since the client may be slow to take it.
        const COPIED: usize = 64 * 1024;
        let body: &[u8] = if self.head_only { b"" } else { &reply.body };
        let mut bytes = self.head(reply.status, reply.content_type, &reply.headers, Some(reply.body.len()));
        if body.len() <= COPIED {
            bytes.extend_from_slice(body);
            self.write(&bytes, None)?;
        } else {
            self.write(&bytes, None)?;
            self.write(body, None)?;
        }
        Ok(body.len() as u64)
    }

    /// Begins an answer whose length is not known: `first` goes out together with the head.
    pub fn stream(mut self, content_type: &'static str, headers: &[Header], first: &[u8]) -> (StreamWriter, io::Result<()>) {
        let mut bytes = self.head(200, content_type, headers, None);
        frame(&mut bytes, first, self.http10);
        let result = self.write(&bytes, event_deadline());
        let writer = StreamWriter { responder: self, frame: Vec::new(), sent: first.len() as u64 };
        (writer, result)
    }

    fn head(&self, status: u16, content_type: &str, headers: &[Header], length: Option<usize>) -> Vec<u8> {
        let mut head = Vec::with_capacity(256 + length.unwrap_or(1024));
        let reason = tiny_http::StatusCode(status);
        let reason = reason.default_reason_phrase();
        let date = httpdate::fmt_http_date(SystemTime::now());
        // Writing to a Vec cannot fail.
        let _ = write!(head, "HTTP/1.1 {status} {reason}\r\nDate: {date}\r\nContent-Type: {content_type}\r\n");
        // The upstream's own id stands in for ours where its answer is passed on.
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("x-request-id")) {
            let _ = write!(head, "X-Request-Id: {}\r\n", self.id);
        }
        for (name, value) in headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        if let Some(length) = length {
            let _ = write!(head, "Content-Length: {length}\r\n");
        } else if !self.http10 {
            head.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
        }
        if !self.keep {
            head.extend_from_slice(b"Connection: close\r\n");
        }
        head.extend_from_slice(b"\r\n");
        head
    }

    /// Writes all of it; the client may take its time, as long as it takes anything within 30 s, or all of
    /// it `until` then.
    fn write(&mut self, mut bytes: &[u8], until: Option<Instant>) -> io::Result<()> {
        self.is_used = true;
        let out: &mut dyn Write = match &mut self.out {
            Out::Library(writer) => writer,
            Out::Socket => &mut &*self.stream,
        };
        let mut write = || {
            while !bytes.is_empty() {
                match out.write(bytes) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => bytes = &bytes[written..],
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
                if !bytes.is_empty() && until.is_some_and(|until| Instant::now() >= until) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            out.flush()
        };
        let result = write();
        if result.is_err() {
            self.answers.broken.store(true, Ordering::Relaxed);
        }
        result
    }
}

fn frame(bytes: &mut Vec<u8>, piece: &[u8], http10: bool) {
    if http10 {
        bytes.extend_from_slice(piece);
    } else if !piece.is_empty() {
        let _ = write!(bytes, "{:x}\r\n", piece.len());
        bytes.extend_from_slice(piece);
        bytes.extend_from_slice(b"\r\n");
    }
}

/// An answer under way, in chunked coding (RFC 9112, section 7.1) or, for HTTP/1.0, until close.
pub struct StreamWriter {
    responder: Responder,
    frame: Vec<u8>,
    sent: u64,
}

/// A worker waits while a stream's client takes a piece, so that has an end.
fn event_deadline() -> Option<Instant> {
    Some(Instant::now() + config::CLIENT_STALL)
}

impl StreamWriter {
    /// The client's socket has room for a little more.
    pub fn has_room(&self) -> bool {
        self.responder.has_room(0)
    }

    /// Sends a piece at once, in one write. Errs when the client has gone or takes nothing.
    pub fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.frame.clear();
        frame(&mut self.frame, piece, self.responder.http10);
        let frame = std::mem::take(&mut self.frame);
        let result = self.responder.write(&frame, event_deadline());
        self.frame = frame;
        self.sent += piece.len() as u64;
        result
    }

    /// Sends a last piece together with the end of the body. Returns the bytes of body sent in all.
    pub fn finish(mut self, piece: &[u8]) -> io::Result<u64> {
        self.frame.clear();
        frame(&mut self.frame, piece, self.responder.http10);
        if !self.responder.http10 {
            self.frame.extend_from_slice(b"0\r\n\r\n");
        }
        let frame = std::mem::take(&mut self.frame);
        self.responder.write(&frame, event_deadline()).map(|()| self.sent + piece.len() as u64)
    }

    /// Ends the connection instead of the body, so that the client cannot take what it got for whole.
    pub fn abort(self) {
        self.responder.answers.broken.store(true, Ordering::Relaxed);
        let _ = self.responder.stream.shutdown(Shutdown::Both);
    }

    /// Bytes of body handed over so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }
}
