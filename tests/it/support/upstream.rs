//! An upstream that plays a script: what it sends, when, and how it ends is written in the test.

use super::PATIENCE;
use super::gate::Gate;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// One step of an answer. After the last one the connection stays open for the next request.
#[derive(Clone)]
pub enum Step {
    Send(Vec<u8>),
    Wait(Gate),
    /// Tells the test that all before was sent.
    Tell(Sender<()>),
    /// Only where time itself is tested.
    Pause(Duration),
    /// The same bytes again and again, until the caller leaves.
    Repeat(Vec<u8>),
    /// Says nothing more, until the caller leaves.
    Silence,
    Close,
    Reset,
}

/// One request as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Received {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("the upstream is sent JSON")
    }

    pub fn is_streaming(&self) -> bool {
        self.json()["stream"] == true
    }

    /// What the user asked: the content of the last message.
    #[track_caller]
    pub fn question(&self) -> String {
        let body = self.json();
        let last = body["messages"].as_array().and_then(|messages| messages.last().cloned());
        last.expect("messages")["content"].as_str().expect("a text").to_owned()
    }
}

type Script = dyn Fn(usize, &Received) -> Vec<Step> + Send + Sync;

#[derive(Default)]
struct Seen {
    requests: Vec<Received>,
    connections: usize,
    /// Callers that went away before the script had ended.
    left: usize,
    /// Connections that the script closed, or the caller between two calls.
    closed: usize,
}

pub struct FakeUpstream {
    address: SocketAddr,
    /// Its thread waits for callers on a copy of it.
    listener: TcpListener,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

impl FakeUpstream {
    /// One script a call, in order.
    pub fn script(calls: Vec<Vec<Step>>) -> FakeUpstream {
        FakeUpstream::play(move |index, _| {
            let beyond = || reply(500, &[], "the script has no such call");
            calls.get(index).cloned().unwrap_or_else(beyond)
        })
    }

    /// The same script for every call.
    pub fn always(steps: Vec<Step>) -> FakeUpstream {
        FakeUpstream::play(move |_, _| steps.clone())
    }

    /// A script that depends on the request.
    pub fn answering(script: impl Fn(&Received) -> Vec<Step> + Send + Sync + 'static) -> FakeUpstream {
        FakeUpstream::play(move |_, request| script(request))
    }

    fn play(script: impl Fn(usize, &Received) -> Vec<Step> + Send + Sync + 'static) -> FakeUpstream {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("its address");
        let seen = Arc::<(Mutex<Seen>, Condvar)>::default();
        let script: Arc<Script> = Arc::new(script);
        let (shared, waiting) = (Arc::clone(&seen), listener.try_clone().expect("a copy"));
        std::thread::spawn(move || {
            for stream in waiting.incoming().map_while(Result::ok) {
                let (script, seen) = (Arc::clone(&script), Arc::clone(&shared));
                tell(&seen, |seen| seen.connections += 1);
                std::thread::spawn(move || serve(stream, &*script, &seen));
            }
        });
        FakeUpstream { address, listener, seen }
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn requests(&self) -> Vec<Received> {
        self.seen.0.lock().unwrap().requests.clone()
    }

    pub fn calls(&self) -> usize {
        self.seen.0.lock().unwrap().requests.len()
    }

    pub fn connections(&self) -> usize {
        self.seen.0.lock().unwrap().connections
    }

    #[track_caller]
    pub fn wait_for_calls(&self, count: usize) {
        self.wait_for("calls", |seen| seen.requests.len() >= count);
    }

    #[track_caller]
    pub fn wait_until_left(&self, count: usize) {
        self.wait_for("callers that went away", |seen| seen.left >= count);
    }

    #[track_caller]
    pub fn wait_until_closed(&self, count: usize) {
        self.wait_for("connections closed", |seen| seen.closed >= count);
    }

    #[track_caller]
    fn wait_for(&self, what: &str, reached: impl Fn(&Seen) -> bool) {
        let started = Instant::now();
        let mut seen = self.seen.0.lock().unwrap();
        while !reached(&seen) {
            let left = PATIENCE.saturating_sub(started.elapsed());
            assert!(!left.is_zero(), "the upstream waited in vain for {what}: {:?}", seen.requests);
            seen = self.seen.1.wait_timeout(seen, left).unwrap().0;
        }
    }
}

/// Otherwise each of a thousand would keep its thread and its descriptors to the end of all tests.
impl Drop for FakeUpstream {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

fn tell(seen: &(Mutex<Seen>, Condvar), change: impl FnOnce(&mut Seen)) {
    change(&mut seen.0.lock().unwrap());
    seen.1.notify_all();
}

fn serve(stream: TcpStream, script: &Script, seen: &(Mutex<Seen>, Condvar)) {
    let _ = stream.set_nodelay(true);
    let Ok(writing) = stream.try_clone() else { return };
    let mut reading = BufReader::new(stream);
    while let Some(request) = receive(&mut reading) {
        let mut index = 0;
        tell(seen, |seen| {
            index = seen.requests.len();
            seen.requests.push(request.clone());
        });
        for step in script(index, &request) {
            match play(step, &writing, &mut reading) {
                Went::On => {}
                Went::Closed => {
                    drop((writing, reading));
                    tell(seen, |seen| seen.closed += 1);
                    return;
                }
                Went::Away => {
                    tell(seen, |seen| seen.left += 1);
                    return;
                }
            }
        }
    }
    tell(seen, |seen| seen.closed += 1);
}

enum Went {
    On,
    Closed,
    Away,
}

fn play(step: Step, mut writing: &TcpStream, reading: &mut BufReader<TcpStream>) -> Went {
    match step {
        Step::Send(bytes) => match writing.write_all(&bytes) {
            Ok(()) => Went::On,
            Err(_) => Went::Away,
        },
        Step::Wait(gate) => match gate.wait() {
            true => Went::On,
            false => Went::Closed,
        },
        Step::Tell(told) => {
            // Nobody need listen.
            let _ = told.send(());
            Went::On
        }
        Step::Pause(duration) => {
            std::thread::sleep(duration);
            Went::On
        }
        Step::Repeat(bytes) => {
            while writing.write_all(&bytes).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
            Went::Away
        }
        Step::Silence => {
            let mut byte = [0];
            match reading.read(&mut byte) {
                Ok(1) => panic!("the caller sent more on a connection that was not answered"),
                _ => Went::Away,
            }
        }
        Step::Close => Went::Closed,
        Step::Reset => {
            let _ = rustix::net::sockopt::set_socket_linger(writing, Some(Duration::ZERO));
            Went::Closed
        }
    }
}

/// The next request of a connection, or nothing where the caller has gone.
pub fn receive(reading: &mut BufReader<TcpStream>) -> Option<Received> {
    let mut line = || {
        let mut line = String::new();
        let read = reading.read_line(&mut line).ok()?;
        (read > 0).then(|| line.trim_end().to_owned())
    };
    let first = line()?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, target) = (words.next()?, words.next()?);
    let mut headers = Vec::new();
    loop {
        let line = line()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let mut request = Received { method, target, headers, body: Vec::new() };
    if let Some(length) = request.header("Content-Length") {
        request.body = vec![0; length.parse().ok()?];
        reading.read_exact(&mut request.body).ok()?;
    } else if request.header("Transfer-Encoding").is_some() {
        request.body = receive_chunks(reading)?;
    }
    Some(request)
}

fn receive_chunks(reading: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        reading.read_line(&mut line).ok()?;
        let size = usize::from_str_radix(line.trim(), 16).ok()?;
        let mut chunk = vec![0; size + 2];
        reading.read_exact(&mut chunk).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.extend(&chunk[..size]);
    }
}

/// A whole answer with `Content-Length`.
pub fn reply(status: u16, headers: &[(&str, &str)], body: &str) -> Vec<Step> {
    let mut head = format!("HTTP/1.1 {status} Said\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    vec![send(format!("{head}\r\n{body}"))]
}

pub fn reply_json(status: u16, body: &Value) -> Vec<Step> {
    reply(status, &[("Content-Type", "application/json")], &body.to_string())
}

/// An error as OpenAI words it.
pub fn refusal(status: u16, message: &str) -> Vec<Step> {
    let error = json!({"message": message, "type": "some_error", "param": null, "code": null});
    reply_json(status, &json!({ "error": error }))
}

/// What OpenAI answers without `stream`.
pub fn completion(text: &str) -> Value {
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1790000000, "model": "fake-model-1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17}
    })
}

/// OpenRouter's form of an answer whose provider failed.
pub fn choice_that_failed(code: u16) -> Value {
    let said = json!({"role": "assistant", "content": ""});
    let error = json!({"code": code, "message": "Provider died"});
    json!({"choices": [{"index": 0, "message": said, "delta": said, "finish_reason": "error", "error": error}]})
}

pub fn answer(text: &str) -> Vec<Step> {
    reply_json(200, &completion(text))
}

pub fn send(bytes: impl Into<Vec<u8>>) -> Step {
    Step::Send(bytes.into())
}

/// The head of a stream whose body comes in chunks: `piece` and `event`, then `end`.
pub fn stream_head() -> Step {
    send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
}

/// One chunk of the body.
pub fn piece(bytes: impl AsRef<[u8]>) -> Step {
    let bytes = bytes.as_ref();
    let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
    chunk.extend(bytes);
    chunk.extend(b"\r\n");
    Step::Send(chunk)
}

pub fn event(data: &str) -> Step {
    piece(format!("data: {data}\n\n"))
}

/// The clean end of a chunked body.
pub fn end() -> Step {
    send("0\r\n\r\n")
}

fn chunk_of(choices: Value, usage: Value) -> String {
    let chunk = json!({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000,
        "model": "fake-model-1", "choices": choices, "usage": usage
    });
    chunk.to_string()
}

pub fn delta(text: &str) -> String {
    chunk_of(json!([{"index": 0, "delta": {"content": text}, "finish_reason": null}]), Value::Null)
}

pub fn finish(reason: &str) -> String {
    chunk_of(json!([{"index": 0, "delta": {}, "finish_reason": reason}]), Value::Null)
}

pub fn usage() -> String {
    chunk_of(json!([]), json!({"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17}))
}

/// A whole stream, from the head to `[DONE]` and the clean end.
pub fn streamed(words: &[&str]) -> Vec<Step> {
    let mut steps = vec![stream_head()];
    steps.extend(words.iter().map(|word| event(&delta(word))));
    steps.extend([event(&finish("stop")), event("[DONE]"), end()]);
    steps
}

/// A port that nobody listens on, and that nobody else gets while this lives.
pub struct RefusingPort(OwnedFd);

impl RefusingPort {
    pub fn new() -> RefusingPort {
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a socket");
        rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        RefusingPort(socket)
    }

    pub fn address(&self) -> SocketAddr {
        let address = rustix::net::getsockname(&self.0).expect("its address");
        address.try_into().expect("an internet address")
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address())
    }
}
