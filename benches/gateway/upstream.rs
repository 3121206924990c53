//! The fake LLM: an OpenAI-compatible API on one thread, cheap enough to leave the CPUs to the gateway.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::wire::{self, Epoll, now};

/// A part of every whole answer, by which a client knows it.
pub const PHRASE: &[u8] = b"A reverse proxy accepts";

/// What stands before and after the time in each chunk of a stream.
pub const STAMP: (&[u8], u8) = (b"\"t=", b';');

const ANSWER: &str = "A reverse proxy accepts requests on behalf of servers and passes them on. It can end TLS, spread \
    load, keep connections warm, cache what does not change, hide how many servers there are and let one of them be \
    replaced while nobody notices.";

/// How the upstream answers from now on.
#[derive(Clone, Copy)]
pub struct Script {
    /// Before a whole answer.
    pub delay: Duration,
    /// Of a stream; the first one comes at once.
    pub chunks: u32,
    /// Between two of them.
    pub gap: Duration,
}

pub struct Upstream {
    pub address: SocketAddr,
    script: Arc<Mutex<Script>>,
}

impl Upstream {
    /// Starts it on a free port; it ends with the process.
    pub fn start() -> Upstream {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        // Many connections come at once, and one that found the queue full would come back a second later.
        rustix::net::listen(&listener, 4096).expect("a longer queue");
        let address = listener.local_addr().expect("its address");
        let script = Arc::new(Mutex::new(Script { delay: Duration::ZERO, chunks: 1, gap: Duration::ZERO }));
        let theirs = Arc::clone(&script);
        std::thread::spawn(move || {
            let (epoll, answer) = (Epoll::new(), answer());
            Server { script: theirs, epoll, connections: HashMap::new(), due: BinaryHeap::new(), answer }.run(&listener)
        });
        Upstream { address, script }
    }

    pub fn play(&self, script: Script) {
        *self.script.lock().expect("nobody panicked") = script;
    }

    /// Answers whole, so long after the question.
    pub fn answer_after(&self, delay: Duration) {
        self.play(Script { delay, chunks: 1, gap: Duration::ZERO });
    }
}

fn answer() -> Vec<u8> {
    let body = format!(
        r#"{{"id":"chatcmpl-bench","object":"chat.completion","created":1790000000,"model":"bench-1","choices":[{{"index":0,"message":{{"role":"assistant","content":"{ANSWER}","refusal":null}},"logprobs":null,"finish_reason":"stop"}}],"usage":{{"prompt_tokens":17,"completion_tokens":46,"total_tokens":63}},"service_tier":"default","system_fingerprint":"fp_bench"}}"#
    );
    format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// One event in a chunk of its own.
fn event(data: &str) -> String {
    format!("{:x}\r\ndata: {data}\n\n\r\n", data.len() + 8)
}

fn chunk(choices: &str, usage: &str) -> String {
    event(&format!(
        r#"{{"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1790000000,"model":"bench-1","choices":[{choices}],"usage":{usage}}}"#
    ))
}

struct Connection {
    stream: TcpStream,
    /// What came of a request so far.
    request: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Answer,
    Chunk(u32),
}

struct Server {
    script: Arc<Mutex<Script>>,
    epoll: Epoll,
    connections: HashMap<u64, Connection>,
    /// What is to be sent when, and on which connection.
    due: BinaryHeap<Reverse<(u64, u64, Step)>>,
    answer: Vec<u8>,
}

impl Server {
    fn run(mut self, listener: &TcpListener) {
        self.epoll.add(listener, 0);
        let mut last_id = 0;
        loop {
            let next = self.due.peek().map(|Reverse((at, ..))| *at);
            for id in self.epoll.wait(next) {
                if id != 0 {
                    self.read(id);
                } else if let Ok((stream, _)) = listener.accept() {
                    last_id += 1;
                    let _ = stream.set_nodelay(true);
                    self.epoll.add(&stream, last_id);
                    self.connections.insert(last_id, Connection { stream, request: Vec::new() });
                }
            }
            while let Some(Reverse((at, id, step))) = self.due.peek().copied()
                && at <= now()
            {
                self.due.pop();
                self.send(id, step);
            }
        }
    }

    fn read(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let mut piece = [0; 4096];
        let Ok(len @ 1..) = connection.stream.read(&mut piece) else {
            self.connections.remove(&id);
            return;
        };
        connection.request.extend_from_slice(&piece[..len]);
        let Some((head, body)) = wire::head(&connection.request) else { return };
        if connection.request.len() < head + body.unwrap_or(0) {
            return;
        }
        let streams = wire::find(&connection.request, b"\"stream\":true").is_some();
        connection.request.clear();
        let delay = self.script.lock().expect("nobody panicked").delay;
        match (streams, delay) {
            (true, _) => self.send(id, Step::Chunk(0)),
            (false, Duration::ZERO) => self.send(id, Step::Answer),
            (false, delay) => self.due.push(Reverse((now() + delay.as_nanos() as u64, id, Step::Answer))),
        }
    }

    fn send(&mut self, id: u64, step: Step) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        // Little enough for the socket's buffer, so that it never waits for a reader.
        let sent = match step {
            Step::Answer => connection.stream.write_all(&self.answer),
            Step::Chunk(number) => {
                let script = *self.script.lock().expect("nobody panicked");
                let mut text = String::new();
                if number == 0 {
                    text += "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
                }
                let delta = format!(r#"{{"index":0,"delta":{{"content":"t={}; words "}},"finish_reason":null}}"#, now());
                text += &chunk(&delta, "null");
                if number + 1 < script.chunks {
                    self.due.push(Reverse((now() + script.gap.as_nanos() as u64, id, Step::Chunk(number + 1))));
                } else {
                    text += &chunk(r#"{"index":0,"delta":{},"finish_reason":"stop"}"#, "null");
                    text += &chunk("", r#"{"prompt_tokens":17,"completion_tokens":60,"total_tokens":77}"#);
                    text += &event("[DONE]");
                    text += "0\r\n\r\n";
                }
                connection.stream.write_all(text.as_bytes())
            }
        };
        if sent.is_err() {
            self.connections.remove(&id);
        }
    }
}
