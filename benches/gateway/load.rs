//! The clients: any number of connections on one thread, each sending one request after the other.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::upstream::{PHRASE, STAMP};
use crate::wire::{self, Epoll, now};

/// How long the clients wait for answers after the last request was due.
const PATIENCE: Duration = Duration::from_secs(20);

/// A request and where to send it.
pub struct Call {
    pub to: SocketAddr,
    pub request: Vec<u8>,
    /// What the body of a right answer contains.
    phrase: &'static [u8],
    /// How many stamps a right answer contains.
    stamps: u32,
}

impl Call {
    pub fn get(to: SocketAddr, target: &str, headers: &str) -> Call {
        let request = format!("GET {target} HTTP/1.1\r\nHost: bench\r\n{headers}\r\n").into_bytes();
        Call { to, request, phrase: b"\"items\":[{", stamps: 0 }
    }

    pub fn post(to: SocketAddr, target: &str, headers: &str, body: &str) -> Call {
        let len = body.len();
        let head = "Content-Type: application/json\r\nContent-Length";
        let request = format!("POST {target} HTTP/1.1\r\nHost: bench\r\n{headers}{head}: {len}\r\n\r\n{body}").into_bytes();
        Call { to, request, phrase: PHRASE, stamps: 0 }
    }

    /// The same of a stream of so many chunks.
    pub fn of_chunks(self, chunks: u32) -> Call {
        Call { phrase: b"data: [DONE]\n", stamps: chunks, ..self }
    }
}

/// How many connections, opened evenly over which time, and what each does.
#[derive(Clone, Copy)]
pub struct Plan {
    pub connections: usize,
    pub over: Duration,
    pub each: Each,
}

impl Plan {
    /// So many connections that ask and ask again.
    pub fn lasting(connections: usize, millis: u64) -> Plan {
        Plan { connections, over: Duration::ZERO, each: Each::Lasts(Duration::from_millis(millis)) }
    }
}

/// What a connection does until it is closed.
#[derive(Clone, Copy)]
pub enum Each {
    Requests(usize),
    /// One request after the other, so long. The first fifth of the time warms up and does not count.
    Lasts(Duration),
}

/// Times in nanoseconds, in ascending order.
#[derive(Default)]
pub struct Measured {
    pub seconds: f64,
    /// All answers, those while it warmed up included.
    pub answers: usize,
    /// Answers that were none, or not the right ones, or did not come.
    pub failed: usize,
    /// From the request to the whole answer.
    pub latency: Vec<u64>,
    /// From the request to the first byte of the body.
    pub first_byte: Vec<u64>,
    /// From the upstream's sending of a chunk to its arrival.
    pub chunk_delay: Vec<u64>,
}

struct Connection {
    stream: TcpStream,
    sent_at: u64,
    /// Requests that may still follow this one.
    left: usize,
    /// What came of the answer, and how much of it was looked at for stamps.
    answer: Vec<u8>,
    seen: usize,
    stamps: u32,
}

enum Progress {
    More,
    /// The whole answer, and when its last piece came.
    Done(u64),
    Failed,
}

impl Connection {
    fn open(call: &Call, requests: usize) -> std::io::Result<Connection> {
        let stream = TcpStream::connect(call.to)?;
        stream.set_nodelay(true)?;
        let mut connection = Connection { stream, sent_at: 0, left: requests, answer: Vec::new(), seen: 0, stamps: 0 };
        connection.send(call)?;
        Ok(connection)
    }

    fn send(&mut self, call: &Call) -> std::io::Result<()> {
        self.answer.clear();
        (self.seen, self.stamps) = (0, 0);
        self.left -= 1;
        self.sent_at = now();
        self.stream.write_all(&call.request)
    }

    /// Takes what came and notes its times.
    fn read(&mut self, call: &Call, piece: &mut [u8], measured: &mut Measured) -> Progress {
        let Ok(len @ 1..) = self.stream.read(piece) else { return Progress::Failed };
        let at = now();
        self.answer.extend_from_slice(&piece[..len]);
        let Some((head, body)) = wire::head(&self.answer) else { return Progress::More };
        if self.seen == 0 && self.answer.len() > head {
            self.seen = head;
            measured.first_byte.push(at - self.sent_at);
        }
        while call.stamps > 0
            && let Some((stamp, len)) = stamp(&self.answer[self.seen..])
        {
            measured.chunk_delay.push(at.saturating_sub(stamp));
            self.seen += len;
            self.stamps += 1;
        }
        let whole = body.map_or(self.answer.ends_with(b"\r\n0\r\n\r\n"), |body| self.answer.len() >= head + body);
        if !whole {
            return Progress::More;
        }
        let right = self.answer.starts_with(b"HTTP/1.1 200 ")
            && self.stamps == call.stamps
            && wire::find(&self.answer[head..], call.phrase).is_some();
        if right { Progress::Done(at) } else { Progress::Failed }
    }
}

/// The first stamp in these bytes, and where it ends.
fn stamp(bytes: &[u8]) -> Option<(u64, usize)> {
    let start = wire::find(bytes, STAMP.0)? + STAMP.0.len();
    let len = bytes[start..].iter().position(|b| *b == STAMP.1)?;
    let stamp = std::str::from_utf8(&bytes[start..start + len]).ok()?.parse().ok()?;
    Some((stamp, start + len))
}

/// What this share of the times stays below, in microseconds.
pub fn quantile(sorted: &[u64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).map_or(f64::NAN, |nanos| *nanos as f64 / 1000.0)
}

/// Sends the requests of the plan and waits for the answers.
pub fn drive(call: &Call, plan: Plan) -> Measured {
    let mut measured = Measured::default();
    let mut connections = HashMap::new();
    let mut epoll = Epoll::new();
    let mut piece = vec![0; 64 * 1024];
    let start = now();
    let (requests, counts_from, ends) = match plan.each {
        Each::Requests(number) => (number, start, u64::MAX),
        Each::Lasts(time) => (usize::MAX, start + time.as_nanos() as u64 / 5, start + time.as_nanos() as u64),
    };
    let opens = |number: usize| start + (plan.over.as_nanos() as u64) * number as u64 / plan.connections as u64;
    let mut opened = 0;
    let mut quiet_since = start;
    while opened < plan.connections || !connections.is_empty() {
        while opened < plan.connections && opens(opened) <= now() {
            match Connection::open(call, requests) {
                Ok(connection) => {
                    epoll.add(&connection.stream, opened as u64);
                    connections.insert(opened as u64, connection);
                }
                Err(_) => measured.failed += 1,
            }
            opened += 1;
        }
        let patience = quiet_since.max(opens(opened)) + PATIENCE.as_nanos() as u64;
        if now() > patience {
            measured.failed += connections.len();
            break;
        }
        let ready = epoll.wait(Some(if opened < plan.connections { opens(opened) } else { patience }));
        for id in ready {
            let Some(connection) = connections.get_mut(&id) else { continue };
            quiet_since = now();
            match connection.read(call, &mut piece, &mut measured) {
                Progress::More => continue,
                Progress::Failed => measured.failed += 1,
                Progress::Done(at) => {
                    measured.answers += 1;
                    if at >= counts_from {
                        measured.latency.push(at - connection.sent_at);
                    }
                    if connection.left > 0 && at < ends {
                        if connection.send(call).is_ok() {
                            continue;
                        }
                        measured.failed += 1;
                    }
                }
            }
            connections.remove(&id);
        }
    }
    measured.seconds = now().saturating_sub(counts_from) as f64 / 1e9;
    for times in [&mut measured.latency, &mut measured.first_byte, &mut measured.chunk_delay] {
        times.sort_unstable();
    }
    measured
}
