//! A stream of the upstream's while it runs: its events, one by one or as many as came together. Knows what is an event, not
//! what is in it.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::BodyReader;
use ureq::http::header;

use super::failure::Failure;
use super::watch::{Ended, Watch};
use super::{Line, Upstream};
use crate::config;
use crate::error::{ApiError, Code, Header, media_type};
use crate::openai::{self, Chat, NoAnswer};
use crate::sse::{Event, Splitter};

/// Comments and other noise of a stream between two events, in bytes.
const MAX_NOISE: usize = 1 << 20;

/// The events of a stream under way.
pub struct Events<'a> {
    line: &'a mut Line,
    /// `None` where it is at its end.
    reader: Option<BodyReader<'static>>,
    splitter: Splitter,
    shape: Shape,
    /// There was an event.
    began: bool,
    /// Fields of the answer's head that clients understand.
    pub headers: Vec<Header>,
}

/// What an answer to a request for a stream is.
#[derive(Clone, Copy, PartialEq)]
enum Shape {
    /// So it says; until it turns out otherwise, it has to be whole before the deadline.
    Json,
    Unknown,
    Stream,
}

/// A stream of the LLM that is not there: its events come one by one, slow enough that a person sees it stream.
pub(super) struct Mocked {
    data: VecDeque<String>,
    /// What is left of the present event.
    event: VecDeque<u8>,
    gap: Duration,
    watch: Watch,
}

impl Mocked {
    pub fn new(data: Vec<String>, delay: Duration, watch: &Watch) -> Mocked {
        let gap = (delay / 10).min(Duration::from_millis(50));
        Mocked { data: data.into(), event: VecDeque::new(), gap, watch: watch.clone() }
    }
}

impl Read for Mocked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.event.is_empty()
            && let Some(data) = self.data.pop_front()
        {
            self.watch.sleep(self.gap)?;
            self.event.extend(format!("data: {data}\n\n").as_bytes());
        }
        self.event.read(buffer)
    }
}

impl Line {
    /// Sends a streaming chat request; returns when the upstream begins to answer, in the time of the question that was begun.
    // Not inlined: each stream waits with every page of stack that was used.
    #[inline(never)]
    pub fn stream(&mut self, client: Arc<TcpStream>, chat: &mut Chat) -> Result<Events<'_>, ApiError> {
        self.watch.begin(client, self.deadline);
        let response = match self.call(chat) {
            Ok(response) => response,
            Err(e) => {
                self.end();
                return Err(self.give_up(e));
            }
        };
        let headers = self.hear(response.headers());
        let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let says_json = content_type.is_some_and(|value| media_type(value).ends_with("json"));
        if !says_json {
            self.watch.only_silence(self.upstream.config.upstream_idle);
        }
        Ok(Events {
            line: self,
            reader: Some(response.into_body().into_reader()),
            splitter: Splitter::new(config::MAX_ANSWER, MAX_NOISE),
            shape: if says_json { Shape::Json } else { Shape::Unknown },
            began: false,
            headers,
        })
    }
}

impl Events<'_> {
    /// Waits for the next events and appends them: those that arrived together. False: the stream
    /// ended as HTTP has it. Errs when it broke off, was silent for too long, or the client has gone.
    // Not inlined: what is read from then on would stand below the buffer on a stack that each stream keeps.
    #[inline(never)]
    pub fn next(&mut self, events: &mut Vec<Event>) -> Result<bool, Box<Failure>> {
        let before = events.len();
        let Some(reader) = &mut self.reader else { return Ok(false) };
        let mut buffer = [0; 1024];
        while events.len() == before {
            self.line.watch.piece_came();
            let read = match reader.read(&mut buffer) {
                Ok(0) => {
                    self.reader = None;
                    self.splitter.finish(events);
                    return Ok(events.len() > before);
                }
                Ok(read) => &buffer[..read],
                Err(e) => return Err(self.broke_off(&e)),
            };
            // Whatever it calls itself: no line of a stream begins as JSON does.
            if self.shape != Shape::Stream
                && let Some(first) = read.trim_ascii_start().first()
            {
                if matches!(first, b'{' | b'[') {
                    return Err(self.no_stream(read));
                }
                self.shape = Shape::Stream;
                self.line.watch.only_silence(self.line.upstream.config.upstream_idle);
            }
            if self.splitter.push(read, events).is_err() {
                let text = "an event of the LLM's stream is too long, or there are only comments";
                return Err(self.upstream().failed(Code::UPSTREAM_BAD_ANSWER, text).into());
            }
        }
        self.began = true;
        Ok(true)
    }

    #[inline(never)]
    fn broke_off(&self, e: &io::Error) -> Box<Failure> {
        let upstream = &self.line.upstream;
        let error = match self.line.watch.ended() {
            Some(Ended::TimedOut) if self.shape != Shape::Json => {
                let idle = upstream.config.upstream_idle.as_secs();
                let text = format!("the LLM's stream was silent for {idle} s (UPSTREAM_IDLE_SECS)");
                upstream.failed(Code::UPSTREAM_TIMEOUT, &text).pointless_to_retry()
            }
            Some(ended) => upstream.ended(ended),
            None if !self.began => {
                upstream.failed(Code::UPSTREAM_BAD_ANSWER, &format!("the LLM's answer broke off before it began: {e}"))
            }
            None => upstream.failed(Code::UPSTREAM_ERROR, &format!("the LLM's stream broke off: {e}")),
        };
        error.into()
    }

    /// What came in place of a stream and began so.
    #[inline(never)]
    fn no_stream(&mut self, start: &[u8]) -> Box<Failure> {
        let Some(reader) = self.reader.take() else {
            return self.upstream().failed(Code::UPSTREAM_BAD_ANSWER, "the LLM did not stream").into();
        };
        if self.shape != Shape::Json {
            self.line.watch.bound(Instant::now() + self.line.upstream.config.upstream_timeout);
        }
        let no = match self.line.whole(reader, start.to_vec()).map(|body| openai::parse_completion(&body)) {
            Ok(Ok(_)) => NoAnswer::from("a whole answer where a stream was asked for".to_string()),
            Ok(Err(no)) => no,
            Err(e) => return e.into(),
        };
        self.upstream().no_answer(Code::UPSTREAM_BAD_ANSWER, "did not stream", &no)
    }

    /// After the last event: reads what is left, if it comes within this time, so that the connection can be used again.
    /// Errs where the body breaks off instead, or the client has gone.
    pub fn settle(&mut self, time: Duration) -> Result<(), Box<Failure>> {
        if let Err(ended) = self.line.watch.without_client(time) {
            return Err(self.line.upstream.ended(ended).into());
        }
        let Some(reader) = &mut self.reader else { return Ok(()) };
        let mut buffer = [0; 256];
        for _ in 0..16 {
            match reader.read(&mut buffer) {
                Ok(1..) => {}
                Err(e) if self.line.watch.ended().is_none() => return Err(self.broke_off(&e)),
                Ok(0) | Err(_) => break,
            }
        }
        Ok(())
    }

    /// Where they come from.
    pub fn upstream(&self) -> &Upstream {
        &self.line.upstream
    }
}

impl Drop for Events<'_> {
    fn drop(&mut self) {
        // A body that was read to its end gives its connection back when it goes.
        self.reader = None;
        self.line.end();
    }
}
