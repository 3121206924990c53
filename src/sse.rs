//! Server-sent events, read from pieces of any size as the HTML standard has it
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>).
//! Pure: knows bytes, not what the events mean.

/// One event: its data lines as they came, and their values.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    /// The data lines byte for byte, each ended by one LF.
    pub lines: Vec<u8>,
    /// The values of the data lines, joined by LF.
    pub data: Vec<u8>,
}

/// An event, or the text between two events, is longer than the limit.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong;

/// Splits a byte stream into events, holding at most one unfinished event.
pub struct Splitter {
    /// Bytes of one event.
    limit: usize,
    /// Bytes between two events.
    noise: usize,
    /// The unfinished line.
    line: Vec<u8>,
    /// The data lines of the unfinished event.
    lines: Vec<u8>,
    /// Bytes since the last event that are not data: comments and other fields.
    idle: usize,
    /// The last byte was a CR, whose LF may still follow.
    after_cr: bool,
    at_start: bool,
}

impl Splitter {
    /// A splitter that refuses more than `limit` bytes in one event and `noise` bytes between two.
    pub fn new(limit: usize, noise: usize) -> Splitter {
        Splitter { limit, noise, line: Vec::new(), lines: Vec::new(), idle: 0, after_cr: false, at_start: true }
    }

    /// Takes the next piece of the stream and appends the events that it completes to `events`.
    pub fn push(&mut self, mut piece: &[u8], events: &mut Vec<Event>) -> Result<(), TooLong> {
        while !piece.is_empty() {
            if std::mem::take(&mut self.after_cr) && piece[0] == b'\n' {
                piece = &piece[1..];
                continue;
            }
            let Some(end) = piece.iter().position(|b| matches!(b, b'\n' | b'\r')) else {
                self.line.extend_from_slice(piece);
                return self.check();
            };
            self.line.extend_from_slice(&piece[..end]);
            self.after_cr = piece[end] == b'\r';
            piece = &piece[end + 1..];
            self.end_line(events);
            self.check()?;
        }
        Ok(())
    }

    /// The event that the stream's end left without its empty line, if there is one.
    pub fn finish(mut self) -> Option<Event> {
        let mut events = Vec::new();
        if !self.line.is_empty() {
            self.end_line(&mut events);
        }
        self.end_line(&mut events);
        events.pop()
    }

    fn check(&self) -> Result<(), TooLong> {
        let held = self.line.len() + self.lines.len();
        if held > self.limit || self.idle > self.noise { Err(TooLong) } else { Ok(()) }
    }

    fn end_line(&mut self, events: &mut Vec<Event>) {
        if std::mem::take(&mut self.at_start) && self.line.starts_with(b"\xef\xbb\xbf") {
            self.line.drain(..3);
        }
        if self.line.is_empty() {
            self.idle += 1;
            if !self.lines.is_empty() {
                self.idle = 0;
                let lines = std::mem::take(&mut self.lines);
                let data = data_of(&lines);
                events.push(Event { lines, data });
            }
        } else if self.line.starts_with(b"data:") || self.line == b"data" {
            self.lines.append(&mut self.line);
            self.lines.push(b'\n');
        } else {
            self.idle += self.line.len() + 1;
        }
        self.line.clear();
    }
}

fn data_of(lines: &[u8]) -> Vec<u8> {
    let mut data = Vec::with_capacity(lines.len());
    for (i, line) in lines.strip_suffix(b"\n").unwrap_or(lines).split(|b| *b == b'\n').enumerate() {
        if i > 0 {
            data.push(b'\n');
        }
        let value = line.strip_prefix(b"data:").unwrap_or_default();
        data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
    }
    data
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
        events.extend(splitter.finish());
        events.into_iter().map(|e| String::from_utf8(e.data).expect("UTF-8")).collect()
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
    fn lines_are_kept_as_they_came() {
        let mut events = Vec::new();
        Splitter::new(1000, 1000).push(b"data:a\r\ndata:  b\r\n\r\n", &mut events).expect("within the limit");
        assert_eq!(events[0].lines, b"data:a\ndata:  b\n");
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
                events.extend(splitter.finish());
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
