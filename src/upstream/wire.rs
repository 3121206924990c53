//! The socket under ureq: connects, sends and receives, and waits as the call's watch has it, but for a stream's next
//! piece. Knows sockets and time, nothing of HTTP or chat.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

use super::buffers::SmallBuffers;
use super::names::Names;
use super::watch::{Ended, Watch};
use crate::config;

/// Leaves looking up names to the connector: ureq resolves before it looks for an open connection.
#[derive(Debug)]
pub struct NoResolver;

impl Resolver for NoResolver {
    fn resolve(&self, _: &ureq::http::Uri, _: &ureq::config::Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        Ok(self.empty())
    }
}

/// Makes connections that watch client and clock.
#[derive(Debug)]
pub struct WireConnector {
    pub watch: Watch,
    pub names: Names,
}

impl Connector<()> for WireConnector {
    type Out = Wire;

    fn connect(&self, details: &ConnectionDetails, _: Option<()>) -> Result<Option<Wire>, ureq::Error> {
        let host = details.uri.host().unwrap_or_default().trim_matches(['[', ']']).to_string();
        let port = details.uri.port_u16().unwrap_or(if details.needs_tls() { 443 } else { 80 });
        let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in self.names.addresses(host, port, &self.watch)? {
            match self.open(address) {
                Ok(stream) => {
                    let (stream, buffers, watch) = (Arc::new(stream), SmallBuffers::default(), self.watch.clone());
                    let wire = Wire { stream, buffers, just_read: false, received: 0, is_patient: false, is_cut: false, watch };
                    return Ok(Some(wire));
                }
                Err(e) if self.watch.ended().is_some() => return Err(e.into()),
                Err(e) => failure = e,
            }
        }
        Err(failure.into())
    }
}

impl WireConnector {
    fn open(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        match rustix::net::connect(&socket, &address) {
            Err(Errno::INPROGRESS) => {
                // One address that swallows packets must not use up the time of the others.
                let mine = Instant::now() + config::UPSTREAM_CONNECT;
                let until = self.watch.until().map_or(mine, |until| until.min(mine));
                match self.watch.wait_until(Some((socket.as_fd(), PollFlags::OUT)), Some(until)) {
                    Err(Ended::TimedOut) if until == mine => return Err(io::ErrorKind::TimedOut.into()),
                    Err(ended) => self.watch.ended_by(ended)?,
                    Ok(()) => sockopt::socket_error(&socket)??,
                }
            }
            done => done?,
        }
        Ok(TcpStream::from(socket))
    }
}

/// One connection to the upstream. Every wait is the watch's, but the one for a stream's next piece: that is the
/// socket's own, a system call less each. Where somebody says that the client has gone, the watch shuts the socket.
#[derive(Debug)]
pub struct Wire {
    stream: Arc<TcpStream>,
    buffers: SmallBuffers,
    just_read: bool,
    /// Bytes since the last piece of a stream.
    received: usize,
    /// The socket waits for as long as a stream may be silent.
    is_patient: bool,
    /// The upstream takes no more of the request.
    is_cut: bool,
    pub watch: Watch,
}

impl Wire {
    /// Waits for what comes next and takes it; 0: the upstream has closed. Who only looks what is there does not wait, and
    /// errs with `WouldBlock`.
    fn receive(&mut self, looks: bool) -> io::Result<usize> {
        let silence = if looks { None } else { self.watch.stream_from(&self.stream, &mut self.received)? };
        if let Some(silence) = silence {
            self.be_patient(silence)?;
        }
        let began = Instant::now();
        let mut is_over = false;
        loop {
            let flags = match silence {
                Some(_) if is_over => RecvFlags::DONTWAIT,
                Some(_) => RecvFlags::empty(),
                None => {
                    if !looks {
                        self.watch.wait(self.stream.as_fd(), PollFlags::IN)?;
                    }
                    RecvFlags::DONTWAIT
                }
            };
            let space = self.buffers.input_append_buf();
            if space.is_empty() {
                return Err(ureq::Error::BodyStalled.into_io());
            }
            match rustix::net::recv(&self.stream, space, flags) {
                Ok((amount, _)) => {
                    // It may have been shut by us.
                    if let (0, Some(ended)) = (amount, self.watch.ended()) {
                        return Err(ended.into());
                    }
                    self.buffers.input_appended(amount);
                    self.received += amount;
                    return Ok(amount);
                }
                Err(Errno::AGAIN) if silence.is_some() => self.watch.ended_by(Ended::TimedOut)?,
                Err(Errno::AGAIN) if !looks => {}
                // Who is stopped and goes on (SIGSTOP, a debugger, a freezer) waits anew, but not for ever; what came
                // meanwhile is there.
                Err(Errno::INTR) => is_over = silence.is_some_and(|silence| began.elapsed() >= silence),
                // ureq takes a reset for the end of a body that ends with its connection.
                Err(e) if silence.is_some() => return Err(io::Error::other(io::Error::from(e))),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// From now on the socket itself waits, for so long.
    fn be_patient(&mut self, silence: Duration) -> io::Result<()> {
        if !std::mem::replace(&mut self.is_patient, true) {
            sockopt::set_socket_timeout(&self.stream, sockopt::Timeout::Recv, Some(silence))?;
            self.stream.set_nonblocking(false)?;
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let output = std::mem::take(&mut self.buffers.output);
        let mut unsent = &output[..std::mem::take(&mut self.buffers.unsent)];
        while !unsent.is_empty() && !self.is_cut {
            match rustix::net::send(&self.stream, unsent, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(written) => unsent = &unsent[written..],
                Err(Errno::AGAIN) => self.watch.wait(self.stream.as_fd(), PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                // Who closes before it has read all may have answered: a body that is too large, say.
                Err(Errno::PIPE | Errno::CONNRESET) => self.is_cut = true,
                Err(e) => return Err(e.into()),
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
        if self.buffers.is_full() { Ok(self.send()?) } else { Ok(()) }
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        // Who gives it no time looks only. All others have what the watch gives them.
        let looks = timeout.after.is_zero();
        if self.buffers.unsent > 0 && !looks {
            self.send()?;
        }
        let amount = self.receive(looks)?;
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
        self.watch.note_reuse(open);
        open
    }
}
