//! Server-sent events, read from pieces of any size as the HTML standard has it
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>).
//! Pure: knows bytes, not what the events mean.

use std::borrow::Cow;

use memchr::{memchr_iter, memchr2};

/// One event: its data lines as they came.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    /// The data lines byte for byte, each ended by one LF; a field `error:`, or an error without a field, as a data line.
    pub lines: Vec<u8>,
    /// Its name is `error`.
    pub is_error: bool,
}

impl Event {
    /// The values of the data lines, joined by LF.
    pub fn data(&self) -> Cow<'_, [u8]> {
        let mut begin = 0;
        let mut values = memchr_iter(b'\n', &self.lines).map(|end| {
            let line = &self.lines[std::mem::replace(&mut begin, end + 1)..end];
            let value = line.strip_prefix(b"data:").unwrap_or_default();
            value.strip_prefix(b" ").unwrap_or(value)
        });
        let mut data = Cow::Borrowed(values.next().unwrap_or_default());
        for value in values {
            data.to_mut().push(b'\n');
            data.to_mut().extend_from_slice(value);
        }
        data
    }
}

/// An event, or the text between two events, is longer than the limit.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong;

/// Splits a byte stream into events, holding at most one unfinished event.
#[derive(Default)]
pub struct Splitter {
    /// Bytes of one event.
    most_event: usize,
    /// Bytes between two events.
    most_noise: usize,
    /// The beginning of an unfinished line.
    line: Vec<u8>,
    /// The data lines of the unfinished event.
    lines: Vec<u8>,
    is_error: bool,
    /// Bytes since the last event that are not data: comments and other fields.
    noise: usize,
    /// The last byte was a CR, whose LF may still follow.
    after_cr: bool,
    at_start: bool,
}

impl Splitter {
    /// A splitter that refuses more than `most_event` bytes in one event and `most_noise` bytes between two.
    pub fn new(most_event: usize, most_noise: usize) -> Splitter {
        Splitter { most_event, most_noise, at_start: true, ..Splitter::default() }
    }

    /// Takes the next piece of the stream and appends the events that it completes to `events`.
    pub fn push(&mut self, mut piece: &[u8], events: &mut Vec<Event>) -> Result<(), TooLong> {
        while !piece.is_empty() {
            if std::mem::take(&mut self.after_cr) && piece[0] == b'\n' {
                piece = &piece[1..];
                continue;
            }
            let Some(end) = memchr2(b'\n', b'\r', piece) else {
                self.line.extend_from_slice(piece);
                return self.check();
            };
            let (line, rest) = piece.split_at(end);
            self.after_cr = rest[0] == b'\r';
            piece = &rest[1..];
            self.end_line(line, events);
            self.check()?;
        }
        Ok(())
    }

    /// Appends the event that the stream's end left without its empty line, if there is one.
    // Not inlined: each stream waits with every page of stack that was used.
    #[inline(never)]
    pub fn finish(&mut self, events: &mut Vec<Event>) {
        if !self.line.is_empty() {
            self.end_line(b"", events);
        }
        self.end_line(b"", events);
    }

    fn check(&self) -> Result<(), TooLong> {
        let held = self.line.len() + self.lines.len();
        if held > self.most_event || self.noise > self.most_noise { Err(TooLong) } else { Ok(()) }
    }

    /// A line is at its end, of which `rest` is what was not there before.
    fn end_line(&mut self, rest: &[u8], events: &mut Vec<Event>) {
        let mut line = std::mem::take(&mut self.line);
        let whole = if line.is_empty() {
            rest
        } else {
            line.extend_from_slice(rest);
            &line
        };
        let whole = match std::mem::take(&mut self.at_start) {
            true => whole.strip_prefix(b"\xef\xbb\xbf").unwrap_or(whole),
            false => whole,
        };
        if whole.is_empty() {
            self.noise += 1;
            let is_error = std::mem::take(&mut self.is_error);
            if !self.lines.is_empty() {
                self.noise = 0;
                events.push(Event { lines: std::mem::take(&mut self.lines), is_error });
            }
        } else if whole.starts_with(b"data:") || whole == b"data" {
            // With room for the empty line that ends the event.
            self.lines.reserve(whole.len() + 2);
            self.lines.extend_from_slice(whole);
            self.lines.push(b'\n');
        } else if let Some(error) = whole.strip_prefix(b"error:").filter(|error| error.trim_ascii_start().starts_with(b"{")) {
            // A field of llama.cpp's own, until 2025; what has no name for it would take the answer for whole.
            self.lines.extend_from_slice(&[b"data: {\"error\":", error, b"}\n"].concat());
        } else if whole.starts_with(b"{\"error\"") {
            // As who stands between us and the LLM may break off what is under way.
            self.lines.extend_from_slice(&[b"data: ", whole, b"\n"].concat());
        } else {
            if let Some(name) = whole.strip_prefix(b"event:") {
                self.is_error = name.trim_ascii() == b"error";
            }
            self.noise += whole.len() + 1;
        }
        line.clear();
        self.line = line;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(pieces: &[&[u8]]) -> Vec<String> {
        let mut splitter = Splitter::new(1000, 1000);
        let mut events = Vec::new();
        for piece in pieces {
            splitter.push(piece, &mut events).expect("within the limit");
        }
        splitter.finish(&mut events);
        events.into_iter().map(|e| String::from_utf8(e.data().into_owned()).expect("UTF-8")).collect()
    }

    #[test]
    fn every_cut_gives_the_same_events() {
        let stream = "\u{feff}data: один\r\n\r\n: note\ndata:{\"a\":1}\ndata\ndata:  two\n\nevent: x\rdata: 🦀\r\r\ndata: [DONE]"
            .as_bytes();
        let whole = split(&[stream]);
        assert_eq!(whole, ["один", "{\"a\":1}\n\n two", "🦀", "[DONE]"]);
        for cut in 0..stream.len() {
            assert_eq!(split(&[&stream[..cut], &stream[cut..]]), whole, "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(split(&bytes), whole);
    }

    #[test]
    fn an_error_in_a_field_of_its_own_is_an_event() {
        let said = split(&[b"error: {\"code\":500}\n\nerror: no JSON\n\nerrors: {}\n\ndata: a\n\n"]);
        assert_eq!(said, ["{\"error\": {\"code\":500}}", "a"]);
    }

    #[test]
    fn endless_lines_events_and_comments_are_refused() {
        for piece in [&b"data: aaaaaaaaaaaaaaaa"[..], b"data: aaaa\n", b": c\n", b"event: x\n", b"\n\r"] {
            let mut splitter = Splitter::new(100, 50);
            let mut events = Vec::new();
            let refused = (0..100).any(|_| splitter.push(piece, &mut events).is_err());
            assert!(refused && events.is_empty());
        }
    }

    /// Some servers send a comment each second, for as long as they think.
    #[test]
    fn comments_and_data_have_no_limit_of_all_together() {
        let (mut splitter, mut events) = (Splitter::new(100, 50), Vec::new());
        for _ in 0..100 {
            assert_eq!(splitter.push(b": working\n\ndata: aaaaaaaa\n\n", &mut events), Ok(()));
        }
        assert_eq!(events.len(), 100);
    }

    proptest! {
        #[test]
        fn any_bytes_give_the_same_events_however_they_are_cut(
            words in prop::collection::vec(
                prop::sample::select(vec![&b"data"[..], b":", b" ", b"x", b"\n", b"\r", b"\r\n", b"\n\n", b"event", b"\xef\xbb\xbf", b"\xff", b"\0"]),
                0..40,
            ),
            cut in 1..9_usize,
        ) {
            let stream = words.concat();
            let read = |pieces: &[&[u8]]| {
                let (mut splitter, mut events) = (Splitter::new(1000, 1000), Vec::new());
                for piece in pieces {
                    splitter.push(piece, &mut events).expect("within the limit");
                }
                splitter.finish(&mut events);
                events
            };
            let whole = read(&[&stream]);
            prop_assert_eq!(&read(&stream.chunks(cut).collect::<Vec<_>>()), &whole);
            // An event's lines are an event stream that says the same.
            for event in whole {
                prop_assert_eq!(read(&[&event.lines, b"\n"]), vec![event]);
            }
        }
    }
}
