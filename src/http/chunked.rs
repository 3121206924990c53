//! A body in chunked coding (RFC 9112, section 7.1), decoded from pieces of any size. Pure: bytes in, body
//! or verdict out. tiny_http's own decoder takes signs, blanks and bare LFs, and collects a line for ever.

use super::head::{self, MAX_HEAD};
use crate::error::{ApiError, Code};

/// The error for a body of more than `limit` bytes.
pub fn too_large(limit: usize) -> ApiError {
    ApiError::new(
        Code::BODY_TOO_LARGE,
        format!("the body is larger than {limit} bytes, the most that is taken here (MAX_BODY_BYTES of a question)"),
    )
}

/// Decodes one body, holding no more than its content.
pub struct Decoder {
    body: Vec<u8>,
    limit: usize,
    state: State,
    /// Bytes of the present line: a chunk's size or the trailer section.
    line: usize,
    /// Bytes of size lines beyond what a chunk may reasonably have.
    excess: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// At a chunk's size, so much of it known; `true`: after its first digit.
    Size(usize, bool),
    Extension(usize),
    SizeLf(usize),
    Data(usize),
    DataCr,
    DataLf,
    /// At the start of a trailer line; `true`: in its name; both are discarded.
    Trailer(bool),
    TrailerValue,
    TrailerLf,
    LastLf,
    Done,
}

impl Decoder {
    /// A decoder for a body of at most `limit` bytes.
    pub fn new(limit: usize) -> Decoder {
        Decoder { body: Vec::new(), limit, state: State::Size(0, false), line: 0, excess: 0 }
    }

    /// Takes the next piece; when the body is complete, returns what follows it. Errs with 400 or 413, after
    /// which nothing more may be read from the connection.
    pub fn push<'a>(&mut self, mut piece: &'a [u8]) -> Result<Option<&'a [u8]>, ApiError> {
        while self.state != State::Done && !piece.is_empty() {
            if let State::Data(left) = self.state {
                let (now, rest) = piece.split_at(left.min(piece.len()));
                self.body.extend_from_slice(now);
                self.state = if now.len() == left { State::DataCr } else { State::Data(left - now.len()) };
                piece = rest;
            } else {
                self.state = self.after(piece[0])?;
                piece = &piece[1..];
            }
        }
        Ok((self.state == State::Done).then_some(piece))
    }

    /// The content so far.
    pub fn into_body(self) -> Vec<u8> {
        self.body
    }

    fn after(&mut self, byte: u8) -> Result<State, ApiError> {
        self.line += 1;
        if self.line + self.excess > MAX_HEAD {
            return Err(broken("its sizes, extensions or trailers are too long"));
        }
        match (self.state, byte) {
            (State::Size(size, _), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = char::from(byte).to_digit(16).unwrap_or_default() as usize;
                let size = size.saturating_mul(16).saturating_add(digit);
                // Known before its data comes, and before it could be too large for a number.
                if size > self.limit - self.body.len() {
                    return Err(too_large(self.limit));
                }
                Ok(State::Size(size, true))
            }
            (State::Size(size, true), b';') => Ok(State::Extension(size)),
            (State::Extension(size), b'\t' | b' '..=b'~') => Ok(State::Extension(size)),
            (State::Size(size, true) | State::Extension(size), b'\r') => Ok(State::SizeLf(size)),
            (State::Size(..), _) => Err(broken("a chunk's size is not a hexadecimal number")),
            (State::Extension(_), _) => Err(broken("a chunk's extension has control characters or is not ASCII")),
            (State::SizeLf(size), b'\n') => {
                // A byte a chunk with a short extension is odd and honest.
                self.excess = (self.excess + self.line).saturating_sub(16 + 2 * size);
                self.line = 0;
                Ok(if size == 0 { State::Trailer(false) } else { State::Data(size) })
            }
            (State::DataCr, b'\r') => Ok(State::DataLf),
            (State::DataLf, b'\n') => {
                self.line = 0;
                Ok(State::Size(0, false))
            }
            (State::DataCr | State::DataLf, _) => Err(broken("a chunk is not as long as its size says")),
            (State::Trailer(false), b'\r') => Ok(State::LastLf),
            (State::Trailer(true), b':') => Ok(State::TrailerValue),
            (State::Trailer(_), byte) if head::is_token(byte) => Ok(State::Trailer(true)),
            (State::TrailerValue, b'\t' | b' '..=b'~' | 0x80..) => Ok(State::TrailerValue),
            (State::TrailerValue, b'\r') => Ok(State::TrailerLf),
            (State::TrailerLf, b'\n') => Ok(State::Trailer(false)),
            (State::LastLf, b'\n') => Ok(State::Done),
            (State::Trailer(_) | State::TrailerValue, _) => Err(broken("a trailer is not a header field")),
            (State::SizeLf(_) | State::TrailerLf | State::LastLf, _) => Err(broken("a CR without its LF")),
            (State::Data(_) | State::Done, _) => Ok(self.state),
        }
    }
}

fn broken(why: &str) -> ApiError {
    head::bad(&format!("the chunked body breaks RFC 9112, section 7.1: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The body, the error's status, or 0 where the end is missing.
    fn decode(pieces: &[&[u8]]) -> Result<Vec<u8>, u16> {
        let mut decoder = Decoder::new(100);
        let mut done = false;
        for piece in pieces {
            done = decoder.push(piece).map_err(|e| e.code.status())?.is_some();
        }
        if done { Ok(decoder.into_body()) } else { Err(0) }
    }

    #[test]
    fn chunks_are_put_together_and_extensions_and_trailers_thrown_away() {
        for (coded, body) in [
            ("0\r\n\r\n", ""),
            ("3\r\nabc\r\n0\r\n\r\n", "abc"),
            ("003;n=v;o=\"x y\"\r\na\r\n\r\n0A\r\n0123456789\r\n00\r\n\r\nGET /", "a\r\n0123456789"),
            ("1\r\na\r\n0\r\nX-Sum: \u{e9}\r\nContent-Length: 5\r\n\r\n", "a"),
        ] {
            assert_eq!(decode(&[coded.as_bytes()]).as_deref(), Ok(body.as_bytes()), "{coded:?}");
        }
    }

    #[test]
    fn what_breaks_the_rules_is_refused_and_what_is_cut_is_incomplete() {
        for (coded, status) in [
            ("", 0),
            ("1", 0),
            ("1\r\na", 0),
            ("1\r\na\r\n0\r\n", 0),
            ("1\r\na\r\n0\r\nX: y\r\n", 0),
            ("\r\n", 400),
            (" 1\r\na\r\n0\r\n\r\n", 400),
            ("+1\r\na\r\n0\r\n\r\n", 400),
            ("-1\r\n", 400),
            ("0x1\r\n", 400),
            ("\n1\r\na\r\n0\r\n\r\n", 400),
            ("\u{b}1\r\na\r\n0\r\n\r\n", 400),
            ("1 \r\na\r\n0\r\n\r\n", 400),
            ("1\na\r\n0\r\n\r\n", 400),
            ("1\ra", 400),
            (";a\r\n", 400),
            ("1;a\nb\r\na\r\n0\r\n\r\n", 400),
            ("1;a\0\r\na\r\n0\r\n\r\n", 400),
            ("1\r\nab\r\n", 400),
            ("1\r\na\n0\r\n\r\n", 400),
            ("0\r\n\n", 400),
            ("0\r\nx\r\n\r\n", 400),
            ("0\r\n: y\r\n\r\n", 400),
            ("0\r\nX: a\nb\r\n\r\n", 400),
            ("65\r\n", 413),
            ("64\r\n", 0),
            ("8000000000000000\r\n", 413),
            ("10000000000000001\r\n", 413),
        ] {
            assert_eq!(decode(&[coded.as_bytes()]), Err(status), "{coded:?}");
        }
        let spent = ["1\r\na\r\n".repeat(64), "25\r\n".to_string()].concat();
        assert_eq!(decode(&[spent.as_bytes()]), Err(413), "the sum counts");
    }

    #[test]
    fn lines_without_end_are_refused_and_small_chunks_are_not() {
        for (start, endless) in [("", "0"), ("1;", "a"), ("0\r\n", "a: b\r\n"), ("0\r\nx", "x")] {
            let coded = [start, &endless.repeat(MAX_HEAD + 1)].concat();
            assert_eq!(decode(&[coded.as_bytes()]), Err(400), "{start:?} {endless:?}");
        }
        let extended = format!("1;{}\r\na\r\n", "x".repeat(300)).repeat(99);
        assert_eq!(decode(&[extended.as_bytes()]), Err(400));
        let small = ["1\r\na\r\n".repeat(100), "0\r\n\r\n".to_string()].concat();
        assert_eq!(decode(&[small.as_bytes()]), Ok(vec![b'a'; 100]));
    }

    proptest! {
        #[test]
        fn whatever_is_coded_comes_out_however_it_is_cut(
            chunks in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..9), 0..3_usize), 0..11), cut in 1..40_usize,
        ) {
            let mut coded = Vec::new();
            for (chunk, form) in &chunks {
                let size = [format!("{:x}", chunk.len()), format!("00{:X}", chunk.len()), format!("{:x};a=\"b\"", chunk.len())];
                coded.extend([size[*form].as_bytes(), b"\r\n", chunk, b"\r\n"].concat());
            }
            coded.extend(b"0\r\n\r\n");
            let body: Vec<u8> = chunks.into_iter().flat_map(|(chunk, _)| chunk).collect();
            prop_assert_eq!(decode(&coded.chunks(cut).collect::<Vec<_>>()), Ok(body));
            prop_assert_eq!(decode(&[&coded[..coded.len() - 1]]), Err(0));
        }

        #[test]
        fn any_bytes_have_one_verdict_however_they_are_cut(
            coded in prop::collection::vec(prop::sample::select(b"01aF;:\r\n x\0+".to_vec()), 0..40), cut in 1..9_usize,
        ) {
            let whole = decode(&[&coded]);
            prop_assert_eq!(decode(&coded.chunks(cut).collect::<Vec<_>>()), whole.clone());
            if let Ok(body) = whole {
                prop_assert!(body.len() <= coded.len());
            }
        }
    }
}
