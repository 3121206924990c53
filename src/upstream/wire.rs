//! The socket under ureq: while it waits for the upstream's answer it also watches the client and the clock, so that
//! one thread can do both and a client that hangs up ends the call at once. A stream's next piece it waits for alone, and
//! can be woken. Knows sockets and time, nothing of HTTP or chat.

use std::fmt;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

use crate::lock::lock;
use crate::{config, kernel};

/// Why waiting ended without what was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    ClientGone,
    TimedOut,
}

/// What the call under way is bound to, shared by its worker and the worker's connections.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<Bounds>>);

#[derive(Default)]
struct Bounds {
    client: Option<Arc<TcpStream>>,
    until: Option<Instant>,
    silence: Option<Duration>,
    ended: Option<Ended>,
    reused: bool,
    /// Nobody waits: a connection is looked at.
    looks: bool,
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

    /// What comes is no stream: it must end within this time from now.
    pub fn within(&self, time: Duration) {
        let mut bounds = lock(&self.0);
        bounds.until = Some(Instant::now() + time);
        bounds.silence = None;
    }

    /// How long the stream under way, which comes from `source`, may be silent; `None` where the call is none yet. From
    /// now on whoever ends the stream shuts that socket; errs where it was ended before.
    fn stream_from(&self, source: &Arc<TcpStream>) -> Result<Option<Duration>, Ended> {
        let mut bounds = lock(&self.0);
        if bounds.silence.is_some() && bounds.source.is_none() {
            bounds.source = Some(Arc::clone(source));
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

    /// From now on the call must end within this time, and the client may go.
    pub fn without_client(&self, time: Duration) {
        *lock(&self.0) = Bounds { until: Some(Instant::now() + time), ..Bounds::default() };
    }

    /// Lets go of the client.
    pub fn end(&self) {
        *lock(&self.0) = Bounds::default();
    }

    /// Why the call ended, where it was not the upstream's doing.
    pub fn ended(&self) -> Option<Ended> {
        lock(&self.0).ended
    }

    /// Whether from now on a read only looks what is there.
    pub fn looks(&self, looks: bool) {
        lock(&self.0).looks = looks;
    }

    /// A connection from before is to be used, and is open or not.
    pub fn found(&self, open: bool) {
        lock(&self.0).reused = open;
    }

    /// Forgets that a connection from before was taken.
    pub fn forget_reuse(&self) {
        lock(&self.0).reused = false;
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
    fn wait(&self, fd: BorrowedFd, flags: PollFlags) -> Result<(), Ended> {
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

    fn ended_by(&self, ended: Ended) -> Result<(), Ended> {
        lock(&self.0).ended = Some(ended);
        Err(ended)
    }

    fn wait_until(&self, fd: Option<(BorrowedFd, PollFlags)>, until: Option<Instant>) -> Result<(), Ended> {
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
            Ok(false) | Err(_) => Err(Ended::TimedOut),
        }
    }
}

impl From<Ended> for ureq::Error {
    fn from(ended: Ended) -> ureq::Error {
        match ended {
            Ended::ClientGone => ureq::Error::Io(io::Error::other("the client went away")),
            Ended::TimedOut => ureq::Error::Timeout(ureq::Timeout::Global),
        }
    }
}

/// Leaves looking up names to the connector: ureq resolves before it looks for an open connection.
#[derive(Debug)]
pub struct NoResolver;

impl Resolver for NoResolver {
    fn resolve(&self, _: &ureq::http::Uri, _: &ureq::config::Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        Ok(self.empty())
    }
}

/// A look-up is shared by who comes within this time; later its answer may be lost, and another is begun.
const SHARED: Duration = Duration::from_secs(2);

/// The look-ups of names, for all connections to one upstream, whose result all take who wait for it. The system's resolver
/// can only be waited for, so a thread of its own does that; where it hangs, one thread hangs for each two seconds.
#[derive(Clone, Default)]
pub struct Names(Arc<Mutex<Weak<Lookup>>>);

struct Lookup {
    /// Ends with the look-up.
    over: UnixStream,
    found: OnceLock<Vec<SocketAddr>>,
    since: Instant,
}

impl Names {
    /// The look-up under way, or a new one.
    fn look_up(&self, host: String, port: u16) -> io::Result<Arc<Lookup>> {
        let mut running = lock(&self.0);
        if let Some(lookup) = running.upgrade().filter(|lookup| lookup.found.get().is_none() && lookup.since.elapsed() < SHARED) {
            return Ok(lookup);
        }
        let (over, ours) = UnixStream::pair()?;
        let lookup = Arc::new(Lookup { over, found: OnceLock::new(), since: Instant::now() });
        let looking = Arc::clone(&lookup);
        std::thread::Builder::new().name("resolve".into()).spawn(move || {
            // Goes last, which says that the look-up is over.
            let _ours = ours;
            let found = (host.as_str(), port).to_socket_addrs().map(Vec::from_iter);
            looking.found.get_or_init(|| found.unwrap_or_default());
        })?;
        *running = Arc::downgrade(&lookup);
        Ok(lookup)
    }
}

/// Makes connections that watch client and clock.
pub struct WireConnector {
    pub watch: Watch,
    pub names: Names,
}

impl Connector<()> for WireConnector {
    type Out = Wire;

    fn connect(&self, details: &ConnectionDetails, _: Option<()>) -> Result<Option<Wire>, ureq::Error> {
        let host = details.uri.host().unwrap_or_default().trim_matches(['[', ']']).to_string();
        let port = details.uri.port_u16().unwrap_or(if details.needs_tls() { 443 } else { 80 });
        let mut failure = ureq::Error::HostNotFound;
        for address in self.resolve(host, port)? {
            match self.open(address) {
                Ok(stream) => {
                    let buffers = SmallBuffers::default();
                    let (stream, watch) = (Arc::new(stream), self.watch.clone());
                    return Ok(Some(Wire { stream, buffers, just_read: false, is_patient: false, is_cut: false, watch }));
                }
                Err(e) if self.watch.ended().is_some() => return Err(e),
                Err(e) => failure = e,
            }
        }
        Err(failure)
    }
}

impl WireConnector {
    fn resolve(&self, host: String, port: u16) -> Result<Vec<SocketAddr>, ureq::Error> {
        if let Ok(ip) = host.parse() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        let lookup = self.names.look_up(host, port)?;
        self.watch.wait(lookup.over.as_fd(), PollFlags::IN)?;
        lookup.found.get().filter(|found| !found.is_empty()).cloned().ok_or(ureq::Error::HostNotFound)
    }

    fn open(&self, address: SocketAddr) -> Result<TcpStream, ureq::Error> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(io::Error::from)?;
        sockopt::set_tcp_nodelay(&socket, true).map_err(io::Error::from)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {}
            Err(Errno::INPROGRESS) => {
                // One address that swallows packets must not use up the time of the others.
                let mine = Instant::now() + config::UPSTREAM_CONNECT;
                let until = self.watch.until().map_or(mine, |until| until.min(mine));
                match self.watch.wait_until(Some((socket.as_fd(), PollFlags::OUT)), Some(until)) {
                    Err(Ended::TimedOut) if until == mine => return Err(io::Error::from(io::ErrorKind::TimedOut).into()),
                    Err(ended) => self.watch.ended_by(ended)?,
                    Ok(()) => {}
                }
                sockopt::socket_error(&socket).map_err(io::Error::from)?.map_err(io::Error::from)?;
            }
            Err(e) => return Err(io::Error::from(e).into()),
        }
        Ok(TcpStream::from(socket))
    }
}

impl fmt::Debug for WireConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WireConnector")
    }
}

/// Buffers that a stream of minutes can keep: ureq's own take 10 KiB more, to copy a chunked request body
/// through, which no request here has.
#[derive(Default)]
pub struct SmallBuffers {
    pub output: Vec<u8>,
    /// Written but not sent: ureq writes head and body one after the other, and one packet costs the
    /// upstream and us half of two.
    pub unsent: usize,
    input: Vec<u8>,
    filled: usize,
    consumed: usize,
    progress: bool,
}

impl SmallBuffers {
    const OUTPUT: usize = 4 * 1024;
    /// With less room than this it is sent, so that a header field finds enough.
    const ROOM: usize = 2 * 1024;
    const INPUT: usize = 1024;
    /// More than the largest head that ureq takes; what needs more than that at once is nothing sane.
    const MOST_INPUT: usize = 128 * 1024;

    /// What is unsent has to be sent, to make room.
    pub fn is_full(&self) -> bool {
        Self::OUTPUT - self.unsent < Self::ROOM
    }
}

impl Buffers for SmallBuffers {
    fn output(&mut self) -> &mut [u8] {
        if self.output.is_empty() {
            self.output = vec![0; Self::OUTPUT];
        }
        &mut self.output[self.unsent..]
    }

    fn input(&self) -> &[u8] {
        &self.input[self.consumed..self.filled]
    }

    fn input_append_buf(&mut self) -> &mut [u8] {
        if self.consumed > 0 {
            self.input.copy_within(self.consumed..self.filled, 0);
            self.filled -= self.consumed;
            self.consumed = 0;
        }
        if self.filled == self.input.len() && self.filled < Self::MOST_INPUT {
            self.input.resize((2 * self.input.len()).max(Self::INPUT), 0);
        }
        &mut self.input[self.filled..]
    }

    fn input_appended(&mut self, amount: usize) {
        self.filled += amount;
    }

    fn input_consume(&mut self, amount: usize) {
        self.progress = amount > 0;
        self.consumed += amount;
    }

    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        self.input_append_buf();
        self.output();
        (&mut self.input[self.filled..], &mut self.output[self.unsent..])
    }

    fn can_use_input(&self) -> bool {
        self.progress && self.filled > self.consumed
    }
}

/// One connection to the upstream. Every wait is the watch's, but the one for a stream's next piece: that is the
/// socket's own, a system call less each. Where somebody says that the client has gone, the watch shuts the socket.
pub struct Wire {
    stream: Arc<TcpStream>,
    buffers: SmallBuffers,
    just_read: bool,
    /// The socket waits for as long as a stream may be silent.
    is_patient: bool,
    /// The upstream takes no more of the request.
    is_cut: bool,
    pub watch: Watch,
}

impl Wire {
    /// Waits for what comes next and takes it; 0: the upstream has closed.
    fn receive(&mut self) -> Result<usize, ureq::Error> {
        if lock(&self.watch.0).looks {
            return self.look();
        }
        let silence = self.watch.stream_from(&self.stream)?;
        if let Some(silence) = silence {
            self.be_patient(silence)?;
        }
        loop {
            let flags = match silence {
                Some(_) => RecvFlags::empty(),
                None => {
                    self.watch.wait(self.stream.as_fd(), PollFlags::IN)?;
                    RecvFlags::DONTWAIT
                }
            };
            let space = self.buffers.input_append_buf();
            if space.is_empty() {
                return Err(ureq::Error::BodyStalled);
            }
            match rustix::net::recv(&self.stream, space, flags) {
                Ok((amount, _)) => {
                    // It may have been shut by us.
                    if let (0, Some(ended)) = (amount, self.watch.ended()) {
                        return Err(ended.into());
                    }
                    self.buffers.input_appended(amount);
                    return Ok(amount);
                }
                Err(Errno::AGAIN) if silence.is_some() => self.watch.ended_by(Ended::TimedOut)?,
                Err(Errno::AGAIN | Errno::INTR) => {}
                // ureq takes a reset for the end of a body that ends with its connection.
                Err(e) if silence.is_some() => return Err(io::Error::other(io::Error::from(e)).into()),
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
    }

    /// Takes what is there.
    fn look(&mut self) -> Result<usize, ureq::Error> {
        let space = self.buffers.input_append_buf();
        let (amount, _) = rustix::net::recv(&self.stream, space, RecvFlags::DONTWAIT).map_err(io::Error::from)?;
        self.buffers.input_appended(amount);
        Ok(amount)
    }

    /// From now on the socket itself waits, for so long. Nothing more is sent, and streams are many and long.
    fn be_patient(&mut self, silence: Duration) -> io::Result<()> {
        self.buffers.output = Vec::new();
        if !std::mem::replace(&mut self.is_patient, true) {
            sockopt::set_socket_timeout(&self.stream, sockopt::Timeout::Recv, Some(silence))?;
            self.stream.set_nonblocking(false)?;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), ureq::Error> {
        let mut unsent = &self.buffers.output[..std::mem::take(&mut self.buffers.unsent)];
        while !unsent.is_empty() && !self.is_cut {
            match rustix::net::send(&self.stream, unsent, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(written) => unsent = &unsent[written..],
                Err(Errno::AGAIN) => self.watch.wait(self.stream.as_fd(), PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                // Who closes before it has read all may have answered: a body that is too large, say.
                Err(Errno::PIPE | Errno::CONNRESET) => self.is_cut = true,
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
        Ok(())
    }
}

impl Transport for Wire {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, _: NextTimeout) -> Result<(), ureq::Error> {
        self.buffers.unsent += amount;
        if self.buffers.is_full() { self.send() } else { Ok(()) }
    }

    fn await_input(&mut self, _: NextTimeout) -> Result<bool, ureq::Error> {
        if self.buffers.unsent > 0 {
            self.send()?;
        }
        let amount = self.receive()?;
        self.just_read = amount > 0;
        Ok(amount > 0)
    }

    /// Open means: neither closed by the upstream nor with bytes that nobody asked for.
    fn is_open(&mut self) -> bool {
        // ureq asks when it puts the connection by and when it takes it up again; the second time counts.
        if std::mem::take(&mut self.just_read) {
            return true;
        }
        let mut byte = [0];
        let open = matches!(rustix::net::recv(&self.stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT), Err(Errno::AGAIN));
        self.watch.found(open);
        open
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wire")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    #[test]
    fn a_stream_is_ended_for_its_own_client_only() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let socket = || Arc::new(TcpStream::connect(listener.local_addr().expect("bound")).expect("connected"));
        let (client, other, source) = (socket(), socket(), socket());
        let (_, _, (mut upstream, _)) = (listener.accept(), listener.accept(), listener.accept().expect("accepted"));
        let watch = Watch::default();
        watch.begin(Arc::clone(&client), Instant::now() + Duration::from_secs(60));
        watch.client_left(&client);
        assert_eq!(watch.stream_from(&source), Ok(None), "the wait for the answer's head notices it itself");
        watch.only_silence(Duration::from_secs(60));
        assert_eq!(watch.stream_from(&source), Ok(Some(Duration::from_secs(60))));
        watch.client_left(&other);
        assert_eq!(watch.ended(), None);
        watch.client_left(&client);
        assert_eq!(watch.stream_from(&source), Err(Ended::ClientGone));
        assert_eq!(upstream.read(&mut [0]).ok(), Some(0), "the socket is closed, which wakes who waits for it");
        watch.end();
        watch.client_left(&client);
        assert_eq!(watch.ended(), None, "the call is over");
    }
}
