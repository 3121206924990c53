//! A raw HTTP client: it shows what the server sent, byte for byte, and reads a stream event by event.

use super::PATIENCE;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

#[derive(Clone, Debug)]
pub struct Request {
    method: String,
    target: String,
    version: &'static str,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

pub fn get(target: &str) -> Request {
    Request {
        method: "GET".into(),
        target: target.into(),
        version: "HTTP/1.1",
        headers: vec![("Host".into(), "proxy.test".into())],
        body: Vec::new(),
    }
}

pub fn post(target: &str, body: &Value) -> Request {
    post_bytes(target, body.to_string())
}

pub fn post_bytes(target: &str, body: impl Into<Vec<u8>>) -> Request {
    let body = body.into();
    get(target)
        .method("POST")
        .header("Content-Type", "application/json")
        .header("Content-Length", &body.len().to_string())
        .body(body)
}

pub fn streaming(question: &str) -> Request {
    post("/api/streaming", &json!({ "question": question }))
}

impl Request {
    pub fn method(mut self, method: &str) -> Request {
        self.method = method.into();
        self
    }

    /// Another value where the header is there already.
    pub fn header(self, name: &str, value: &str) -> Request {
        let mut request = self.without(name);
        request.headers.push((name.into(), value.into()));
        request
    }

    pub fn without(mut self, name: &str) -> Request {
        self.headers.retain(|(known, _)| known != name);
        self
    }

    pub fn key(self, secret: &str) -> Request {
        self.header("Authorization", &format!("Bearer {secret}"))
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Request {
        self.body = body.into();
        self
    }

    pub fn version_1_0(mut self) -> Request {
        self.version = "HTTP/1.0";
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut head = format!("{} {} {}\r\n", self.method, self.target, self.version);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let mut bytes = format!("{head}\r\n").into_bytes();
        bytes.extend(&self.body);
        bytes
    }
}

/// The status line and the headers.
#[derive(Debug)]
pub struct Head {
    pub status: u16,
    pub headers: Vec<(String, String)>,
}

impl Head {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    fn is_chunked(&self) -> bool {
        self.header("Transfer-Encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"))
    }
}

/// A whole response.
pub struct Response {
    pub status: u16,
    pub head: Head,
    pub body: Vec<u8>,
}

impl std::fmt::Debug for Response {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "{:?} {}", self.head, String::from_utf8_lossy(&self.body))
    }
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("not JSON ({error}): {self:?}"))
    }

    /// Head and body as one text, to look for what must not be there.
    pub fn everything(&self) -> String {
        format!("{self:?}")
    }

    /// An error in the one shape that all errors have. Gives what stands under `error`.
    #[track_caller]
    pub fn expect_error(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        let json_type = self.header("Content-Type").is_some_and(|kind| kind.starts_with("application/json"));
        assert!(json_type, "an error is JSON: {self:?}");
        let body = self.json();
        assert_eq!(body.as_object().map(|fields| fields.len()), Some(1), "only `error`: {self:?}");
        let error = body["error"].clone();
        expect_error_object(&error, code);
        assert_eq!(error["type"], type_of(status), "{self:?}");
        assert_eq!(error["request_id"].as_str(), self.header("X-Request-Id"), "{self:?}");
        if status == 503 {
            let after = self.header("Retry-After").and_then(|value| value.parse::<u64>().ok());
            assert!(after.is_some(), "every 503 says when to come back: {self:?}");
        }
        error
    }
}

/// The five fields of an error, in a response or in an event.
#[track_caller]
pub fn expect_error_object(error: &Value, code: &str) {
    let mut fields: Vec<&str> = error.as_object().expect("an object").keys().map(String::as_str).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["code", "message", "param", "request_id", "type"], "{error}");
    assert_eq!(error["code"], code, "{error}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
    assert!(error["type"].as_str().is_some_and(|kind| kind.ends_with("_error")), "{error}");
    assert!(error["request_id"].as_str().is_some_and(is_sane_id), "{error}");
}

fn type_of(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    }
}

pub fn is_sane_id(id: &str) -> bool {
    let sane = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=128).contains(&id.len()) && id.bytes().all(sane)
}

/// One connection, kept open until it is dropped or the server closes it.
pub struct Connection {
    reading: BufReader<TcpStream>,
}

impl Connection {
    pub fn open(address: SocketAddr) -> Connection {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).expect("the server accepts");
        stream.set_nodelay(true).expect("nodelay");
        stream.set_read_timeout(Some(PATIENCE)).expect("a read timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a write timeout");
        Connection { reading: BufReader::new(stream) }
    }

    /// For an answer that the server itself has to wait for.
    pub fn patient_for(self, bound: Duration) -> Connection {
        self.reading.get_ref().set_read_timeout(Some(bound)).expect("a read timeout");
        self
    }

    #[track_caller]
    pub fn send(&mut self, request: &Request) {
        self.send_bytes(request.bytes());
    }

    #[track_caller]
    pub fn send_bytes(&mut self, bytes: impl AsRef<[u8]>) {
        self.reading.get_ref().write_all(bytes.as_ref()).expect("the server takes the request");
    }

    #[track_caller]
    pub fn exchange(&mut self, request: &Request) -> Response {
        self.send(request);
        match request.method == "HEAD" {
            true => self.read_bodyless(),
            false => self.read_response(),
        }
    }

    /// Sends a FIN and goes on reading.
    pub fn finish_sending(&self) {
        self.reading.get_ref().shutdown(Shutdown::Write).expect("the connection is open");
    }

    /// Leaves with a RST, as a client that crashes does.
    pub fn reset(self) {
        let linger = rustix::net::sockopt::set_socket_linger(self.reading.get_ref(), Some(Duration::ZERO));
        linger.expect("linger");
    }

    #[track_caller]
    fn read_line(&mut self) -> String {
        let mut line = String::new();
        match self.reading.read_line(&mut line) {
            Ok(0) => panic!("the server closed the connection"),
            Ok(_) => line.trim_end().to_owned(),
            Err(error) => panic!("the server does not answer: {error}"),
        }
    }

    #[track_caller]
    pub fn read_head(&mut self) -> Head {
        let line = self.read_line();
        let mut words = line.split(' ');
        assert!(line.starts_with("HTTP/1."), "not a status line: {line}");
        let status = words.nth(1).and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("not a status line: {line}"));
        let mut headers = Vec::new();
        loop {
            let line = self.read_line();
            if line.is_empty() {
                return Head { status, headers };
            }
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("not a header: {line}"));
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
    }

    #[track_caller]
    pub fn read_bodyless(&mut self) -> Response {
        let head = self.read_head();
        Response { status: head.status, head, body: Vec::new() }
    }

    #[track_caller]
    pub fn read_response(&mut self) -> Response {
        let head = self.read_head();
        let mut body = Vec::new();
        if head.is_chunked() {
            // Comments against silence come faster than the patience for one read ends.
            let started = Instant::now();
            while self.read_chunk(&mut body) {
                assert!(started.elapsed() < 3 * PATIENCE, "a body without end");
            }
        } else if let Some(length) = head.header("Content-Length") {
            body = vec![0; length.parse().expect("a number")];
            self.reading.read_exact(&mut body).expect("as many bytes as announced");
        } else if head.status >= 200 {
            self.reading.read_to_end(&mut body).expect("a body until the connection closes");
        }
        Response { status: head.status, head, body }
    }

    /// One chunk, or false at the end of the body. A body without its end fails the test.
    #[track_caller]
    fn read_chunk(&mut self, body: &mut Vec<u8>) -> bool {
        let line = self.read_line();
        let size = usize::from_str_radix(&line, 16).unwrap_or_else(|_| panic!("not a chunk size: {line}"));
        let mut chunk = vec![0; size + 2];
        self.reading.read_exact(&mut chunk).expect("a whole chunk");
        assert!(chunk.ends_with(b"\r\n"), "a chunk ends its line");
        body.extend(&chunk[..size]);
        size > 0
    }

    /// Sends a request and reads the head of its answer; the rest is read event by event.
    #[track_caller]
    pub fn stream(mut self, request: &Request) -> Stream {
        self.send(request);
        self.into_stream()
    }

    #[track_caller]
    pub fn into_stream(mut self) -> Stream {
        let head = self.read_head();
        Stream { head, connection: self, pending: Vec::new(), ended: false }
    }

    /// True where the server has closed: with a FIN or a RST, and without another byte.
    #[track_caller]
    pub fn is_closed_by_server(&mut self) -> bool {
        let mut byte = [0];
        match self.reading.read(&mut byte) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

/// A piece of an event stream.
#[derive(Debug, PartialEq)]
pub enum Sse {
    Comment(String),
    /// Its data, several lines joined.
    Event(String),
}

/// A response that is read while it is written.
pub struct Stream {
    pub head: Head,
    connection: Connection,
    pending: Vec<u8>,
    ended: bool,
}

impl Stream {
    /// The next comment or event, or none at the proper end of the body.
    #[track_caller]
    pub fn next_piece(&mut self) -> Option<Sse> {
        let mut data: Vec<String> = Vec::new();
        loop {
            let Some(line) = self.next_line() else {
                assert!(data.is_empty(), "the stream ended inside an event: {data:?}");
                return None;
            };
            if let Some(comment) = line.strip_prefix(':') {
                return Some(Sse::Comment(comment.trim().to_owned()));
            }
            if let Some(value) = line.strip_prefix("data:") {
                data.push(value.strip_prefix(' ').unwrap_or(value).to_owned());
            }
            if line.is_empty() && !data.is_empty() {
                return Some(Sse::Event(data.join("\n")));
            }
        }
    }

    /// The next event; comments are passed over.
    #[track_caller]
    pub fn next_event(&mut self) -> Option<String> {
        let started = Instant::now();
        loop {
            assert!(started.elapsed() < 3 * PATIENCE, "only comments");
            match self.next_piece()? {
                Sse::Comment(_) => {}
                Sse::Event(data) => return Some(data),
            }
        }
    }

    #[track_caller]
    pub fn expect_event(&mut self, data: &str) {
        assert_eq!(self.next_event().as_deref(), Some(data));
    }

    /// All events up to the proper end.
    #[track_caller]
    pub fn events(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.next_event()).collect()
    }

    #[track_caller]
    pub fn expect_heartbeat(&mut self) {
        assert_eq!(self.next_piece(), Some(Sse::Comment("keep-alive".into())));
    }

    /// The rest of a stream that fails: at most events, then one error event, then the proper end. Gives the error.
    #[track_caller]
    pub fn expect_failure(&mut self, code: &str) -> Value {
        let mut events = self.events();
        let last = events.pop().expect("an error event");
        let last: Value = serde_json::from_str(&last).unwrap_or_else(|_| panic!("not an error event: {last}"));
        let error = &last["error"];
        expect_error_object(error, code);
        assert_eq!(last.as_object().map(|fields| fields.len()), Some(1), "only `error`: {last}");
        let is_final = |event: &String| event == "[DONE]" || event.contains("\"error\"");
        assert!(!events.iter().any(is_final), "one end only: {events:?}");
        error.clone()
    }

    /// The connection, once the body has ended.
    #[track_caller]
    pub fn into_connection(mut self) -> Connection {
        assert!(self.next_piece().is_none(), "the stream goes on");
        self.connection
    }

    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    pub fn abandon(self) -> Connection {
        self.connection
    }

    #[track_caller]
    fn next_line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.pending.drain(..=end).collect();
                line.pop();
                if line.ends_with(b"\r") {
                    line.pop();
                }
                return Some(String::from_utf8(line).expect("UTF-8"));
            }
            if self.ended {
                assert!(self.pending.is_empty(), "the stream ended inside a line: {:?}", self.pending);
                return None;
            }
            self.read_more();
        }
    }

    #[track_caller]
    fn read_more(&mut self) {
        if self.head.is_chunked() {
            self.ended = !self.connection.read_chunk(&mut self.pending);
            return;
        }
        let mut buffer = [0; 4096];
        let count = self.connection.reading.read(&mut buffer).expect("the stream goes on");
        self.pending.extend(&buffer[..count]);
        self.ended = count == 0;
    }
}
