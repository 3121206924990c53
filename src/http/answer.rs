//! The way back to a client: whole answers and streams, each request answered once. Knows nothing of how
//! requests are read, or of what answers mean.

use std::borrow::Cow;
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::PollFlags;

use super::connection::Connection;
use super::head::Head;
use super::{Listed, wait};
use crate::config;
use crate::error::{ApiError, Code, Header};
use crate::kernel;
use crate::lock::{lock, wait_while};

/// A body of more bytes is not copied behind its head, since the client may be slow to take it.
const COPIED: usize = 64 * 1024;
/// An empty send buffer takes so much: half of the smallest that there is by default (tcp_wmem, tcp(7)). But what goes to a
/// client with a smaller window the kernel cuts into pieces as small, each of which takes a KiB more of the buffer.
const SMALL: usize = 8 * 1024;

/// What became of a connection's answers.
#[derive(Default)]
pub struct Answers {
    broken: AtomicBool,
    pending: Mutex<Pending>,
    answered: Condvar,
}

#[derive(Default)]
struct Pending {
    is_pending: bool,
    is_awaited: bool,
}

impl Answers {
    /// An answer did not get through, or one will never come: nothing may follow.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    fn break_off(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }

    /// The last request is not answered yet: a worker goes on while the answer waits for its commit.
    pub fn is_pending(&self) -> bool {
        lock(&self.pending).is_pending
    }

    fn begin(&self) {
        lock(&self.pending).is_pending = true;
    }

    fn end(&self) {
        let mut pending = lock(&self.pending);
        pending.is_pending = false;
        // Waking costs a system call, also where nobody waits.
        if std::mem::take(&mut pending.is_awaited) {
            self.answered.notify_all();
        }
    }

    /// Waits until the last request is answered, well or not, but no longer than this.
    pub fn wait(&self, time: Duration) {
        let mut pending = lock(&self.pending);
        if pending.is_pending {
            pending.is_awaited = true;
            wait_while(&self.answered, pending, time, |pending| pending.is_pending);
        }
    }
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

/// The client at the other end of this socket has hung up, as far as one can tell.
pub fn is_gone(client: &TcpStream) -> bool {
    wait(client, PollFlags::RDHUP, Instant::now()).unwrap_or(true)
}

/// The right to answer one request, once.
pub struct Responder {
    stream: Arc<TcpStream>,
    /// In the older version, which knows no chunks.
    http10: bool,
    /// Without a body, as for HEAD.
    head_only: bool,
    /// The connection goes on after it.
    keep: bool,
    is_idle: bool,
    /// So much finds room in an empty send buffer.
    most_at_once: usize,
    /// An answer was begun.
    is_used: bool,
    answers: Arc<Answers>,
    /// Last, so that the connection is listed for as long as any part of it is open.
    listed: Arc<Listed>,
}

impl Drop for Responder {
    fn drop(&mut self) {
        // Without an answer the next one would be taken for it.
        if !self.is_used {
            self.answers.break_off();
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        self.answers.end();
    }
}

impl Responder {
    /// The right to answer the connection's last request, which is pending from now on, by its head, where it could be
    /// read.
    pub fn new(connection: &Connection, head: Option<&Head>) -> Responder {
        connection.answers.begin();
        let keep = !connection.closing;
        Responder {
            stream: Arc::clone(&connection.stream),
            http10: head.is_some_and(|head| head.http10),
            head_only: head.map_or(connection.unparsed.starts_with(b"HEAD "), |head| head.method() == "HEAD"),
            keep,
            is_idle: keep && kernel::is_idle(&connection.stream),
            most_at_once: connection.window.min(SMALL),
            is_used: false,
            answers: Arc::clone(&connection.answers),
            listed: Arc::clone(&connection.listed),
        }
    }

    /// The true reason for a failure: a client that seems to have gone may have been shut out by us, at the end of the
    /// grace of a shutdown.
    pub fn reason(&self, e: ApiError) -> ApiError {
        let is_ours = e.code == Code::CLIENT_GONE && self.listed.connections.were_shut();
        if is_ours { ApiError::shutting_down() } else { e }
    }

    /// For tests: the right to answer on this socket.
    #[cfg(test)]
    pub fn on(stream: TcpStream) -> Responder {
        Responder {
            stream: Arc::new(stream),
            http10: false,
            head_only: false,
            keep: true,
            is_idle: true,
            most_at_once: SMALL,
            is_used: false,
            answers: Arc::default(),
            listed: Arc::new(Listed { connections: Arc::default(), inode: 0 }),
        }
    }

    /// The client's socket, to notice that it has gone.
    pub fn client(&self) -> Arc<TcpStream> {
        Arc::clone(&self.stream)
    }

    /// The client has hung up, as far as one can tell.
    pub fn is_client_gone(&self) -> bool {
        is_gone(&self.stream)
    }

    /// An answer of about so many bytes will not wait for the client.
    pub fn has_room(&self, bytes: usize) -> bool {
        bytes <= self.most_at_once && kernel::is_idle(&self.stream)
    }

    /// The same, and the connection will go on after it.
    pub fn takes_at_once(&self, bytes: usize) -> bool {
        self.is_idle && bytes <= self.most_at_once
    }

    /// Whatever is small will not wait for the client, and the connection will go on after it.
    pub fn is_idle(&self) -> bool {
        self.takes_at_once(SMALL)
    }

    /// Sends the answer, under this id. Returns how many bytes of body went out; errs, with the reason, when the client did
    /// not take it, or not all of it `until` then.
    pub fn send(mut self, reply: &Reply, id: &str, until: Option<Instant>) -> Result<u64, Code> {
        // One write for most.
        let body: &[u8] = if self.head_only { b"" } else { &reply.body };
        let mut bytes = self.head(reply.status, reply.content_type, id, &reply.headers, Some(reply.body.len()));
        let (copied, rest) = body.split_at(if body.len() <= COPIED { body.len() } else { 0 });
        bytes.extend_from_slice(copied);
        let sent = self.write(&bytes, until).and_then(|()| self.write(rest, until));
        sent.map_or_else(|_| Err(self.reason(ApiError::client_gone()).code), |()| Ok(body.len() as u64))
    }

    /// Begins an answer whose length is not known: `first` goes out together with the head.
    pub fn stream(mut self, content_type: &str, id: &str, headers: &[Header], first: &[u8]) -> (StreamWriter, io::Result<()>) {
        // The older version knows no other end of a body.
        self.keep &= !self.http10;
        let mut bytes = self.head(200, content_type, id, headers, None);
        frame(&mut bytes, first, self.http10);
        let result = self.write(&bytes, event_deadline());
        let writer = StreamWriter { responder: self, frame: Vec::new(), sent: first.len() as u64 };
        (writer, result)
    }

    fn head(&self, status: u16, content_type: &str, id: &str, headers: &[Header], length: Option<usize>) -> Vec<u8> {
        let mut head = Vec::with_capacity(256 + length.unwrap_or(1024).min(COPIED));
        let reason = tiny_http::StatusCode(status);
        let reason = reason.default_reason_phrase();
        // httpdate panics at a clock before that.
        let date = httpdate::fmt_http_date(SystemTime::now().max(UNIX_EPOCH));
        // Writing to a Vec cannot fail.
        let _ = write!(head, "HTTP/1.1 {status} {reason}\r\nDate: {date}\r\nContent-Type: {content_type}\r\n");
        let _ = write!(head, "X-Request-Id: {id}\r\n");
        // A cache on the way must not give one key's answer to another, whatever it was told (RFC 9111, section 5.2.2.5).
        if !headers.iter().any(|(name, _)| name == "Cache-Control") {
            head.extend_from_slice(b"Cache-Control: no-store\r\n");
        }
        for (name, value) in headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        if let Some(length) = length {
            let _ = write!(head, "Content-Length: {length}\r\n");
        } else if !self.http10 {
            head.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
        }
        match (self.keep, self.http10) {
            (false, _) => head.extend_from_slice(b"Connection: close\r\n"),
            (true, true) => head.extend_from_slice(b"Connection: keep-alive\r\n"),
            (true, false) => {}
        }
        head.extend_from_slice(b"\r\n");
        head
    }

    /// Writes all of it; the client may take its time, as long as it takes anything within 30 s, or all of
    /// it `until` then.
    fn write(&mut self, mut bytes: &[u8], until: Option<Instant>) -> io::Result<()> {
        self.is_used = true;
        if self.answers.is_broken() {
            // What broke off in the middle is not gone on with.
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut write = || {
            while !bytes.is_empty() {
                match (&*self.stream).write(bytes) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => bytes = &bytes[written..],
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
                if !bytes.is_empty() && until.is_some_and(|until| Instant::now() >= until) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Ok(())
        };
        let result = write();
        if result.is_err() {
            self.answers.break_off();
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
    /// What knows the client.
    pub fn responder(&self) -> &Responder {
        &self.responder
    }

    /// Sends a piece at once, in one write. Errs when the client has gone or takes nothing.
    pub fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.put(piece, b"")
    }

    /// Sends a last piece together with the end of the body, where the client is still there. Returns the bytes of body
    /// sent in all.
    pub fn finish(mut self, piece: &[u8]) -> u64 {
        let end: &[u8] = if self.responder.http10 { b"" } else { b"0\r\n\r\n" };
        let before = self.sent;
        let sent = if self.put(piece, end).is_ok() { self.sent } else { before };
        if self.responder.http10 {
            self.responder.answers.break_off();
        }
        sent
    }

    fn put(&mut self, piece: &[u8], end: &[u8]) -> io::Result<()> {
        self.frame.clear();
        frame(&mut self.frame, piece, self.responder.http10);
        self.frame.extend_from_slice(end);
        self.sent += piece.len() as u64;
        self.responder.write(&self.frame, event_deadline())
    }

    /// Ends the connection instead of the body, so that the client cannot take what it got for whole. Returns the bytes
    /// of body sent in all.
    pub fn abort(self) -> u64 {
        self.responder.answers.break_off();
        let _ = self.responder.stream.shutdown(Shutdown::Both);
        self.sent
    }
}
