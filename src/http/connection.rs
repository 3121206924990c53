//! One client's connection: requests are read from it, within limits, by the pure rules of `head` and `chunked`. Knows nothing
//! of what requests mean, or of how they are answered.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::PollFlags;
use rustix::net::{RecvFlags, sockopt};

use super::answer::{Answers, Responder};
use super::chunked::{Decoder, too_large};
use super::head::{Framing, Head, MAX_HEAD};
use super::{Listed, wait};
use crate::config;
use crate::error::{ApiError, Code, is_sane_id};

/// The first read of a request has room for so many bytes; only larger ones make it grow. What is no larger than 1,032 glibc
/// keeps for the thread that freed it: 2 MiB where 2,000 streams end.
const FIRST_READ: usize = 1040;
/// And each read of a body for at least so many.
const PIECE: usize = 16 * 1024;

/// One client's connection: an HTTP/1.x server's side of it.
pub struct Connection {
    pub(super) stream: Arc<TcpStream>,
    peer: SocketAddr,
    /// So many bytes the client had room for when it came.
    pub(super) window: usize,
    /// How long a read waits, as the socket was told.
    patience: Duration,
    /// Bytes that were received and belong to the next request, or to the body that is being read.
    pub(super) unparsed: Vec<u8>,
    /// The empty line before a head was skipped.
    passed_over: bool,
    /// The last answer says that no other follows.
    pub(super) closing: bool,
    /// The last request was not read to its end: its client may still be sending, so many bytes of a body where it said
    /// how many.
    owed: Option<u64>,
    pub(super) answers: Arc<Answers>,
    /// The library's side, whose type it keeps to itself: it closes the connection when it goes.
    _client: Box<dyn Send>,
    /// Last, so that the connection is listed for as long as any part of it is open.
    pub(super) listed: Arc<Listed>,
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
    /// One that was just accepted: its socket, and the library's side of it.
    pub(super) fn new(
        stream: Arc<TcpStream>,
        peer: SocketAddr,
        window: usize,
        client: Box<dyn Send>,
        listed: Arc<Listed>,
    ) -> Connection {
        Connection {
            stream,
            peer,
            window,
            patience: config::CLIENT_STALL,
            unparsed: Vec::new(),
            passed_over: false,
            closing: false,
            owed: None,
            answers: Arc::default(),
            _client: client,
            listed,
        }
    }

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
                Ok(None) if at_once => return Turn::Quiet,
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
                    // Who tries again is to do so on a new connection, where another server may be.
                    let is_end = body.as_ref().is_err_and(|e| e.code == Code::SHUTTING_DOWN);
                    let keep = keep && !head.close && !is_end;
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
                // Who is stopped and goes on (SIGSTOP, a debugger, a freezer) waits anew, but not for ever; what came
                // meanwhile is there.
                Err(rustix::io::Errno::INTR) if began.elapsed() >= patience => flags = RecvFlags::DONTWAIT,
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
            // Not cut to fewer bits where a `usize` has 32: what is left of the body would be read as requests.
            (Framing::Length(length), _) => Some(usize::try_from(length).unwrap_or(usize::MAX)),
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
        let allowed = config::BODY_TIME + Duration::from_secs((received / config::BODY_RATE) as u64);
        if began.elapsed() > allowed {
            return timeout(format!("the body was not complete within {} s, for what came of it", allowed.as_secs()));
        }
        match self.receive(config::CLIENT_STALL) {
            Ok(Some(read @ 1..)) => Ok(read),
            Ok(None) => timeout(format!("nothing of the body came for {} s", config::CLIENT_STALL.as_secs())),
            _ => Err(ApiError::client_gone()),
        }
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
