//! The wait of a call: for the upstream, and for the client and the clock at once, so that one thread can do both and a
//! client that hangs up ends the call at once. A stream's next piece is waited for alone, and that can be ended from
//! another thread. Knows sockets and time, nothing of HTTP or chat.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::kernel;
use crate::lock::lock;

/// Why waiting ended without what was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    ClientGone,
    TimedOut,
}

/// What the call under way is bound to, shared by its worker and the worker's connections.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<Mutex<Bounds>>);

#[derive(Debug, Default)]
struct Bounds {
    client: Option<Arc<TcpStream>>,
    until: Option<Instant>,
    silence: Option<Duration>,
    ended: Option<Ended>,
    reused: bool,
    /// Since when a stream's next piece is waited for.
    since: Option<Instant>,
    /// The socket that a stream comes from.
    source: Option<Arc<TcpStream>>,
}

impl Watch {
    /// Begins a call for this client that must end by `until`.
    pub fn begin(&self, client: Arc<TcpStream>, until: Instant) {
        *lock(&self.0) = Bounds { client: Some(client), until: Some(until), ..Bounds::default() };
    }

    /// From now on only a silence of this length ends the call.
    pub fn only_silence(&self, silence: Duration) {
        let mut bounds = lock(&self.0);
        bounds.until = None;
        bounds.silence = Some(silence);
    }

    /// A stream's next piece is waited for from now on.
    pub fn piece_came(&self) {
        lock(&self.0).since = None;
    }

    /// Bounds what is left of the call, which is no stream, by this time instead, and forgets that another time was over.
    pub fn bound(&self, until: Instant) {
        let mut bounds = lock(&self.0);
        (bounds.until, bounds.silence) = (Some(until), None);
        bounds.ended = bounds.ended.filter(|ended| *ended != Ended::TimedOut);
    }

    /// How long the stream under way, which comes from `source`, may be silent; `None` where the call is none yet. From
    /// now on whoever ends the stream shuts that socket; errs where it was ended before. `received`: the bytes that came
    /// since its last piece.
    pub fn stream_from(&self, source: &Arc<TcpStream>, received: &mut usize) -> Result<Option<Duration>, Ended> {
        // More than a record of TLS, which is no piece until its last byte has come.
        const NO_PIECE: usize = 32 * 1024;
        let mut bounds = lock(&self.0);
        if let Some(silence) = bounds.silence {
            bounds.source.get_or_insert_with(|| Arc::clone(source));
            let since = *bounds.since.get_or_insert_with(|| {
                *received = 0;
                Instant::now()
            });
            // Much that is no piece, such as trailers without end, does not break it.
            if *received > NO_PIECE && since.elapsed() > silence {
                bounds.ended.get_or_insert(Ended::TimedOut);
            }
        }
        bounds.ended.map_or(Ok(bounds.silence), Err)
    }

    /// Ends the stream that this client has left, where it is still the one under way.
    pub fn client_left(&self, client: &Arc<TcpStream>) {
        let mut bounds = lock(&self.0);
        if bounds.silence.is_some() && bounds.client.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, client)) {
            bounds.ended = Some(Ended::ClientGone);
            // Wakes its worker.
            bounds.source.iter().for_each(|source| drop(source.shutdown(Shutdown::Both)));
        }
    }

    /// From now on the call must end within this time, and the client may go. Errs where it was ended before.
    pub fn without_client(&self, time: Duration) -> Result<(), Ended> {
        let mut bounds = lock(&self.0);
        if let Some(ended) = bounds.ended {
            return Err(ended);
        }
        *bounds = Bounds { until: Some(Instant::now() + time), ..Bounds::default() };
        Ok(())
    }

    /// Lets go of the client.
    pub fn end(&self) {
        *lock(&self.0) = Bounds::default();
    }

    /// Why the call ended, where it was not the upstream's doing.
    pub fn ended(&self) -> Option<Ended> {
        lock(&self.0).ended
    }

    /// Notes whether the attempt that begins runs on a connection from before.
    pub fn note_reuse(&self, reused: bool) {
        lock(&self.0).reused = reused;
    }

    /// The attempt under way runs on a connection from before, which may have died meanwhile.
    pub fn reused(&self) -> bool {
        lock(&self.0).reused
    }

    /// When the call has to be over, where it has to.
    pub fn until(&self) -> Option<Instant> {
        lock(&self.0).until
    }

    /// Waits for a time. Errs when the client goes first.
    pub fn sleep(&self, time: Duration) -> Result<(), Ended> {
        let wake = Instant::now() + time;
        let until = self.until().map_or(wake, |until| until.min(wake));
        match self.wait_until(None, Some(until)) {
            Err(Ended::TimedOut) if until == wake => Ok(()),
            ended => ended.or_else(|ended| self.ended_by(ended)),
        }
    }

    /// Waits until `fd` is ready. Errs when the client goes or the time is over first.
    pub fn wait(&self, fd: BorrowedFd, flags: PollFlags) -> Result<(), Ended> {
        let (until, silence) = {
            let bounds = lock(&self.0);
            (bounds.until, bounds.silence)
        };
        // An upstream that never pauses is never waited for.
        if until.is_some_and(|until| Instant::now() >= until) {
            return self.ended_by(Ended::TimedOut);
        }
        let silence = silence.map(|silence| Instant::now() + silence);
        let until = [until, silence].into_iter().flatten().min();
        self.wait_until(Some((fd, flags)), until).or_else(|ended| self.ended_by(ended))
    }

    /// Notes why the call ended, and errs with that.
    pub fn ended_by(&self, ended: Ended) -> Result<(), Ended> {
        lock(&self.0).ended = Some(ended);
        Err(ended)
    }

    /// Waits until `fd` is ready, or without one for the client alone, but not longer than `until`. Errs when the client goes
    /// or the time is over first, without a note of that.
    pub fn wait_until(&self, fd: Option<(BorrowedFd, PollFlags)>, until: Option<Instant>) -> Result<(), Ended> {
        let client = lock(&self.0).client.clone();
        // RDHUP: as nginx does, a client's FIN counts as gone, for a closed socket looks the same.
        let client = client.as_deref().map(|client| PollFd::new(client, PollFlags::RDHUP));
        let is_watched = client.is_some();
        let upstream = fd.as_ref().map(|(fd, flags)| PollFd::new(fd, *flags));
        let mut fds: Vec<PollFd> = client.into_iter().chain(upstream).collect();
        match kernel::poll(&mut fds, until) {
            // Client first: an answer that nobody reads is not worth waiting for, even if it is there.
            Ok(true) if is_watched && !fds[0].revents().is_empty() => Err(Ended::ClientGone),
            Ok(true) => Ok(()),
            Ok(false) => Err(Ended::TimedOut),
            Err(e) => {
                log::warn!("the LLM cannot be waited for: {e}");
                Err(Ended::TimedOut)
            }
        }
    }
}

/// Nobody reads it: the watch is asked why.
impl From<Ended> for io::Error {
    fn from(_: Ended) -> io::Error {
        io::Error::other("the call is over")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    /// A record of TLS over a slow line is none, either, before its last byte is there.
    #[test]
    fn what_brings_no_piece_is_silence_where_it_is_much() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let source = Arc::new(TcpStream::connect(listener.local_addr().expect("bound")).expect("connected"));
        let (watch, mut received) = (Watch::default(), 7);
        watch.only_silence(Duration::ZERO);
        assert_eq!((watch.stream_from(&source, &mut received), received), (Ok(Some(Duration::ZERO)), 0));
        received += 32 * 1024;
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(watch.stream_from(&source, &mut received), Ok(Some(Duration::ZERO)));
        received += 1;
        watch.piece_came();
        assert_eq!((watch.stream_from(&source, &mut received), received), (Ok(Some(Duration::ZERO)), 0));
        received += 32 * 1024 + 1;
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(watch.stream_from(&source, &mut received), Err(Ended::TimedOut));
    }

    #[test]
    fn a_stream_is_ended_for_its_own_client_only() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let socket = || Arc::new(TcpStream::connect(listener.local_addr().expect("bound")).expect("connected"));
        let (client, other, source) = (socket(), socket(), socket());
        let (_, _, (mut upstream, _)) = (listener.accept(), listener.accept(), listener.accept().expect("accepted"));
        let watch = Watch::default();
        watch.begin(Arc::clone(&client), Instant::now() + Duration::from_secs(60));
        watch.client_left(&client);
        assert_eq!(watch.stream_from(&source, &mut 0), Ok(None), "the wait for the answer's head notices it itself");
        watch.only_silence(Duration::from_secs(60));
        assert_eq!(watch.stream_from(&source, &mut 0), Ok(Some(Duration::from_secs(60))));
        watch.client_left(&other);
        assert_eq!(watch.ended(), None);
        watch.client_left(&client);
        assert_eq!(watch.stream_from(&source, &mut 0), Err(Ended::ClientGone));
        assert_eq!(upstream.read(&mut [0]).ok(), Some(0), "the socket is closed, which wakes who waits for it");
        let _ = watch.without_client(Duration::ZERO);
        assert_eq!(watch.ended(), Some(Ended::ClientGone), "what ended it is not forgotten");
        watch.end();
        watch.client_left(&client);
        assert_eq!(watch.ended(), None, "the call is over");
    }
}
