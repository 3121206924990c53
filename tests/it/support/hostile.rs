//! What attacks are made of: chance that can be repeated, raw bytes and whatever came back for them, and what the kernel
//! says about the program.

use super::client::{Head, Response};
use super::proxy::Proxy;
use super::{PATIENCE, eventually};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Random numbers from a seed (xorshift64*): the same attack again when it is needed.
pub struct Chance(u64);

impl Chance {
    /// From `ATTACK_SEED`, or else from the one given. Says which, for who reads a failure.
    pub fn new(seed: u64) -> Chance {
        let given = std::env::var("ATTACK_SEED").ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or(seed);
        eprintln!("chance: ATTACK_SEED={seed}");
        Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.number() % limit.max(1) as u64) as usize
    }

    pub fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.number() as u8).collect()
    }

    /// The same bytes, damaged in one place.
    pub fn damage(&mut self, bytes: &mut Vec<u8>, poison: &[&[u8]]) {
        let at = self.below(bytes.len() + 1);
        let end = (at + self.below(12)).min(bytes.len());
        match self.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            1 => drop(bytes.drain(at..end)),
            2 => bytes.truncate(at),
            3 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            _ => {
                let poison = self.pick(poison).to_vec();
                bytes.splice(at..at, poison);
            }
        }
    }

    /// The same bytes in random pieces, most of them small.
    pub fn pieces<'a>(&mut self, mut bytes: &'a [u8]) -> Vec<&'a [u8]> {
        let mut pieces = Vec::new();
        while !bytes.is_empty() {
            let most = *self.pick(&[1, 4, 40, 4000]);
            let (piece, rest) = bytes.split_at((1 + self.below(most)).min(bytes.len()));
            pieces.push(piece);
            bytes = rest;
        }
        pieces
    }
}

/// How a connection ended for whoever went on reading it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    Closed,
    Reset,
    /// Still open when the patience was over.
    Open,
}

pub fn plug_in(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, PATIENCE).expect("the server accepts");
    stream.set_nodelay(true).expect("nodelay");
    stream.set_read_timeout(Some(PATIENCE)).expect("a read timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a write timeout");
    stream
}

/// A connection that takes little at once: small buffers, and segments so small that the kernel keeps little, too.
pub fn plug_in_narrow(address: SocketAddr) -> TcpStream {
    // Otherwise the programs of other tests that start meanwhile would have it, too.
    let closed_on_exec = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, closed_on_exec, None).expect("a socket");
    let smallest: libc::c_int = 88;
    let (place, size) = ((&raw const smallest).cast(), size_of_val(&smallest) as libc::socklen_t);
    // SAFETY: the kernel reads one c_int at the given place.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_MAXSEG, place, size) };
    assert_eq!(set, 0, "a small segment size");
    // The least there is: half of it is the window.
    sockopt::set_socket_recv_buffer_size(&socket, 1).expect("a small buffer");
    rustix::net::connect(&socket, &address).expect("the server accepts");
    TcpStream::from(socket)
}

/// Sends all of it, or as much as the server takes.
pub fn throw(mut stream: &TcpStream, pieces: &[&[u8]]) {
    for piece in pieces {
        if stream.write_all(piece).is_err() {
            return;
        }
    }
}

/// Everything that comes until the server ends the connection.
pub fn hear(mut stream: &TcpStream) -> (Vec<u8>, End) {
    let mut heard = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (heard, End::Closed),
            Ok(count) => heard.extend(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return (heard, End::Open),
            Err(_) => return (heard, End::Reset),
        }
    }
}

/// Sends bytes on a connection of their own and says no more. Gives what came back until the server closed.
#[track_caller]
pub fn shout(address: SocketAddr, pieces: &[&[u8]]) -> Vec<Response> {
    let stream = plug_in(address);
    throw(&stream, pieces);
    let _ = stream.shutdown(Shutdown::Write);
    let (heard, end) = hear(&stream);
    assert_ne!(end, End::Open, "the server holds on to {:?}", String::from_utf8_lossy(&pieces.concat()));
    responses(&heard)
}

/// All whole responses in these bytes, which must be nothing else. Interim ones (1xx) are passed over.
#[track_caller]
pub fn responses(mut bytes: &[u8]) -> Vec<Response> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let shown = String::from_utf8_lossy(bytes).into_owned();
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| panic!("no response: {shown:?}"));
        let head = std::str::from_utf8(&bytes[..end]).expect("a head is text");
        bytes = &bytes[end + 4..];
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
        let status: u16 = status.unwrap_or_else(|| panic!("no status line: {shown:?}"));
        let fields = lines.map(|line| line.split_once(": ").unwrap_or_else(|| panic!("no header: {line:?}")));
        let headers = fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let head = Head { status, headers };
        if status < 200 {
            continue;
        }
        let mut body = Vec::new();
        if let Some(length) = head.header("Content-Length") {
            let length = length.parse().expect("a length");
            assert!(bytes.len() >= length, "a body is cut: {shown:?}");
            body = bytes[..length].to_vec();
            bytes = &bytes[length..];
        } else if head.header("Transfer-Encoding").is_some() {
            let streams = head.header("Content-Type").is_some_and(|kind| kind.starts_with("text/event-stream"));
            (body, bytes) = match dechunk(bytes) {
                Some((whole, used)) => (whole, &bytes[used..]),
                // Whoever says that nothing more will come counts as gone, and its stream ends there.
                None if streams => (bytes.to_vec(), &bytes[bytes.len()..]),
                None => panic!("a chunked body is broken: {shown:?}"),
            };
        }
        found.push(Response { status, head, body });
    }
    found
}

/// A chunked body by the letter of RFC 9112, section 7.1, without trailers: its content, and how many bytes it took. None
/// where it is broken or does not end.
pub fn dechunk(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut content = Vec::new();
    let mut at = 0;
    loop {
        let line = bytes[at..].windows(2).position(|two| two == b"\r\n")?;
        let line = &bytes[at..at + line];
        at += line.len() + 2;
        let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let (size, extension) = line.split_at(digits);
        let clean = |byte: &u8| matches!(byte, b'\t' | b' '..=b'~');
        if extension.first().is_some_and(|first| *first != b';') || !extension.iter().all(clean) {
            return None;
        }
        let size = usize::from_str_radix(std::str::from_utf8(size).ok()?, 16).ok()?;
        if size == 0 {
            break;
        }
        let chunk = bytes.get(at..at.checked_add(size)?)?;
        at += size;
        if bytes.get(at..at + 2)? != b"\r\n" {
            return None;
        }
        at += 2;
        content.extend(chunk);
    }
    loop {
        let line = bytes[at..].windows(2).position(|two| two == b"\r\n")?;
        let line = &bytes[at..at + line];
        at += line.len() + 2;
        if line.is_empty() {
            return Some((content, at));
        }
        let (name, value) = line.split_at(line.iter().position(|byte| *byte == b':')?);
        let token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
        if name.is_empty() || !name.iter().all(token) || value.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
            return None;
        }
    }
}

/// `eventually` for what takes longer than the usual patience.
#[track_caller]
pub fn within(bound: Duration, what: &str, mut check: impl FnMut() -> bool) {
    let until = Instant::now() + bound.saturating_sub(PATIENCE);
    while Instant::now() < until && !check() {
        std::thread::sleep(Duration::from_millis(50));
    }
    eventually(what, check);
}

/// What the kernel says about the program.
impl Proxy {
    fn kernel_says(&self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.pid().as_raw_nonzero());
        fs::read_to_string(path).expect("the program runs")
    }

    fn memory_line(&self, name: &str) -> usize {
        let status = self.kernel_says("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line of that name");
        let kibibytes: usize = line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("a number");
        kibibytes * 1024
    }

    /// Bytes of memory in use now.
    pub fn memory(&self) -> usize {
        self.memory_line("VmRSS")
    }

    /// Bytes of memory that were ever in use at once.
    pub fn memory_peak(&self) -> usize {
        self.memory_line("VmHWM")
    }

    /// Bytes of addresses in use, with memory behind them or not.
    pub fn address_space(&self) -> usize {
        self.memory_line("VmSize")
    }

    /// Open file descriptors.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid().as_raw_nonzero())).expect("the program runs").count()
    }

    /// The soft and the hard limit of open files.
    pub fn descriptor_limits(&self) -> (String, String) {
        let limits = self.kernel_says("limits");
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).expect("a line of that name");
        let mut words = line.split_whitespace().map(str::to_owned);
        (words.next().expect("a soft limit"), words.next().expect("a hard limit"))
    }

    /// Processor time used so far, in seconds: of the kernel's ticks there are a hundred in each.
    pub fn processor_seconds(&self) -> f64 {
        let stat = self.kernel_says("stat");
        let (_, fields) = stat.rsplit_once(')').expect("a name in brackets");
        let ticks = |at: usize| fields.split_whitespace().nth(at).and_then(|field| field.parse::<f64>().ok()).expect("ticks");
        (ticks(11) + ticks(12)) / 100.0
    }
}
