//! The head of a request, held against RFC 9112 and our limits. Pure: bytes in, verdict out.

use memchr::memchr2;

use crate::error::{ApiError, Code};

/// The largest head, from the request line to the empty line, in bytes.
pub const MAX_HEAD: usize = 16 * 1024;
/// The longest request target, in bytes.
pub const MAX_TARGET: usize = 8 * 1024;
/// The largest number of header fields.
pub const MAX_FIELDS: usize = 100;

/// How the body is delimited (RFC 9112, section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// This many bytes; 0 also where the head says nothing.
    Length(u64),
    Chunked,
}

/// A complete head that can be read.
#[derive(Debug)]
pub struct Head {
    /// The head's bytes, the empty line included; the ranges below point into it.
    bytes: Vec<u8>,
    method: (usize, usize),
    target: (usize, usize),
    fields: Vec<[usize; 4]>,
    pub http10: bool,
    pub framing: Framing,
    /// The client will send no further request on this connection.
    pub close: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    /// Why it is refused all the same, with 400, 417 or 505; then nothing more may be read from the connection.
    pub fault: Option<ApiError>,
}

impl Head {
    /// Reads the head at the start of `bytes`: `None` while it is incomplete. Errs with 400, 414 or 431 where it cannot
    /// be read, after which nothing more may be read from the connection.
    pub fn parse(bytes: &[u8]) -> Result<Option<Head>, ApiError> {
        // Of an empty line before it, which is passed over, there may be half.
        if matches!(bytes, b"" | b"\r") {
            return Ok(None);
        }
        let window = &bytes[..bytes.len().min(MAX_HEAD)];
        let (mut request, mut fields, mut start) = (None, Vec::with_capacity(16), 0);
        // A line is ended by CRLF and by nothing else (RFC 9112, section 2.2, lets us refuse the rest).
        while let Some(length) = memchr2(b'\r', b'\n', &window[start..]) {
            let end = start + length;
            match window.get(end + 1) {
                _ if window[end] == b'\n' => return Err(bad("a line ends with a bare LF; lines end with CRLF")),
                Some(b'\n') => {}
                Some(_) => return Err(bad("a CR without its LF")),
                None => break,
            }
            let line = (start, end);
            start = end + 2;
            match request {
                None if length == 0 => return Err(bad("the request line is empty")),
                None => request = Some(request_line(bytes, line)?),
                Some(request) if length == 0 => return Ok(Some(Head::judge(&bytes[..start], request, fields))),
                Some(_) if fields.len() == MAX_FIELDS => {
                    return Err(ApiError::new(Code::HEADERS_TOO_LARGE, format!("more than {MAX_FIELDS} header fields")));
                }
                Some(_) => fields.push(field(bytes, line)?),
            }
        }
        incomplete(bytes, request.is_none())
    }

    /// Bytes of the head, the empty line included.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The method as sent; it is a token.
    pub fn method(&self) -> &str {
        std::str::from_utf8(&self.bytes[self.method.0..self.method.1]).unwrap_or_default()
    }

    /// The target's path, not decoded, without query; `*` for the asterisk form.
    pub fn path(&self) -> &str {
        self.split_target().0
    }

    /// What follows the target's first `?`, not decoded; empty where there is none.
    pub fn query(&self) -> &str {
        self.split_target().1
    }

    fn split_target(&self) -> (&str, &str) {
        let target = std::str::from_utf8(&self.bytes[self.target.0..self.target.1]).unwrap_or_default();
        target.split_once('?').unwrap_or((target, ""))
    }

    /// The value of the first field of that name (in any case), without surrounding blanks; one that is not UTF-8
    /// is U+FFFD, which no field means.
    pub fn field(&self, name: &str) -> Option<&str> {
        let mut named = self.fields.iter().filter(|f| self.bytes[f[0]..f[1]].eq_ignore_ascii_case(name.as_bytes()));
        named.next().map(|f| std::str::from_utf8(&self.bytes[f[2]..f[3]]).unwrap_or("\u{fffd}"))
    }

    fn judge(head: &[u8], (method, target, http10, fault): RequestLine, fields: Vec<[usize; 4]>) -> Head {
        let framing = Framing::Length(0);
        let (bytes, close, expects_continue) = (head.to_vec(), http10, false);
        let mut head = Head { bytes, method, target, fields, http10, framing, close, expects_continue, fault };
        let fault = head.judge_fields().err();
        head.fault = head.fault.or(fault);
        head
    }

    fn judge_fields(&mut self) -> Result<(), ApiError> {
        let (mut hosts, mut lengths, mut codings) = (0, 0, 0);
        let (mut close, mut keep) = (false, !self.http10);
        for [name, name_end, value, value_end] in &self.fields {
            let (name, value) = (&self.bytes[*name..*name_end], &self.bytes[*value..*value_end]);
            let is = |wanted: &str| name.eq_ignore_ascii_case(wanted.as_bytes());
            if is("host") {
                hosts += 1;
                if value.iter().any(|b| !b.is_ascii_graphic() || b"/?#@,\\".contains(b)) {
                    return Err(bad("Host is not a host and port"));
                }
            } else if is("content-length") {
                lengths += 1;
                if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
                    return Err(bad("Content-Length is not a number"));
                }
                // More digits than a u64 holds are still a length, only larger than any limit.
                let digits = std::str::from_utf8(value).unwrap_or_default();
                self.framing = Framing::Length(digits.parse().unwrap_or(u64::MAX));
            } else if is("transfer-encoding") {
                codings += 1;
                if !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(bad("Transfer-Encoding is not chunked, the only coding known here"));
                }
            } else if is("expect") {
                if !value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(ApiError::new(
                        Code::EXPECTATION_FAILED,
                        "Expect is not 100-continue, the only expectation known here",
                    ));
                }
                // An HTTP/1.0 client would not understand that it may go on (RFC 9110, section 10.1.1).
                self.expects_continue = !self.http10;
            } else if is("connection") {
                for option in value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                    close |= option.eq_ignore_ascii_case(b"close");
                    keep |= option.eq_ignore_ascii_case(b"keep-alive");
                }
            }
        }
        // RFC 9112, section 9.3
        self.close = close || !keep;
        match hosts {
            0 if !self.http10 => return Err(bad("Host is missing")),
            0 | 1 => {}
            _ => return Err(bad("Host is there more than once")),
        }
        match (lengths, codings) {
            (0, 0) | (1, 0) => {}
            (0, 1) if self.http10 => return Err(bad("HTTP/1.0 has no Transfer-Encoding")),
            (0, 1) => self.framing = Framing::Chunked,
            (_, 0) => return Err(bad("Content-Length is there more than once")),
            (0, _) => return Err(bad("Transfer-Encoding is there more than once")),
            _ => return Err(bad("Content-Length together with Transfer-Encoding")),
        }
        Ok(())
    }
}

/// A request that is not HTTP as it should be.
pub fn bad(message: &str) -> ApiError {
    ApiError::new(Code::BAD_REQUEST, format!("malformed request: {message}"))
}

fn incomplete(bytes: &[u8], in_request_line: bool) -> Result<Option<Head>, ApiError> {
    if in_request_line && bytes.len() > MAX_TARGET + 64 {
        return Err(too_long());
    }
    if bytes.len() >= MAX_HEAD {
        return Err(ApiError::new(Code::HEADERS_TOO_LARGE, format!("the header block is larger than {MAX_HEAD} bytes")));
    }
    // What cannot begin a request is refused at once, not when the client tires of waiting.
    let method = bytes.split(|b| *b == b' ').next().unwrap_or_default();
    // How a TLS handshake begins (RFC 8446, section 5.1).
    if in_request_line && bytes.starts_with(b"\x16\x03") {
        return Err(bad("it is TLS, and this port speaks plain HTTP; ask by http://, or a reverse proxy in front"));
    }
    if in_request_line && !method.iter().all(|b| is_token(*b)) {
        return Err(bad("the method is not a token"));
    }
    Ok(None)
}

fn too_long() -> ApiError {
    ApiError::new(Code::URI_TOO_LONG, format!("the request target is longer than {MAX_TARGET} bytes"))
}

type Range = (usize, usize);

/// Where method and target stand, whether the version is 1.0, and what is wrong with the version.
type RequestLine = (Range, Range, bool, Option<ApiError>);

fn request_line(head: &[u8], (start, end): Range) -> Result<RequestLine, ApiError> {
    let line = &head[start..end];
    let mut blanks = (0..line.len()).filter(|at| line[*at] == b' ');
    let (Some(first), Some(second), None) = (blanks.next(), blanks.next(), blanks.next()) else {
        return Err(bad("the request line is not METHOD TARGET VERSION"));
    };
    let (method, target, version) = (&line[..first], &line[first + 1..second], &line[second + 1..]);
    if method.is_empty() || method.len() > 32 || !method.iter().all(|b| is_token(*b)) {
        return Err(bad("the method is not a token"));
    }
    if target.len() > MAX_TARGET {
        return Err(too_long());
    }
    let (http10, fault) = match version {
        b"HTTP/1.1" => (false, None),
        b"HTTP/1.0" => (true, None),
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            (false, Some(ApiError::new(Code::VERSION_NOT_SUPPORTED, "only HTTP/1.1 and HTTP/1.0 are spoken here")))
        }
        _ => return Err(bad("the version is not HTTP/1.1")),
    };
    if !target.iter().all(u8::is_ascii_graphic) {
        return Err(bad("the target has characters that a URL cannot have"));
    }
    let mut target = (start + first + 1, start + second);
    // The absolute form, as clients of a proxy send it, means the same path here.
    let text = &head[target.0..target.1];
    let begins_with = |scheme: &&&[u8]| text.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
    if let Some(scheme) = [&b"http://"[..], b"https://"].iter().find(begins_with) {
        let end = text.iter().skip(scheme.len()).position(|b| b"/?#".contains(b)).map(|at| scheme.len() + at);
        if matches!(text[scheme.len()..end.unwrap_or(text.len())], [] | [b':', ..]) {
            return Err(bad("the target has no host"));
        }
        match end {
            Some(at) if text[at] == b'/' => target.0 += at,
            Some(_) => return Err(bad("the target has no path")),
            // No path means / (RFC 9110, section 4.2.3), and one stands before the host.
            None => target = (target.0 + scheme.len() - 1, target.0 + scheme.len()),
        }
    } else if text != b"*" && !text.starts_with(b"/") {
        return Err(bad("the target does not start with /"));
    }
    Ok(((start, start + first), target, http10, fault))
}

fn field(head: &[u8], (start, end): Range) -> Result<[usize; 4], ApiError> {
    let line = &head[start..end];
    if matches!(line[0], b' ' | b'\t') {
        return Err(bad("a header line starts with a blank (obs-fold)"));
    }
    let colon = line.iter().position(|b| *b == b':').ok_or_else(|| bad("a header line has no colon"))?;
    if colon == 0 || !line[..colon].iter().all(|b| is_token(*b)) {
        return Err(bad("a header name is not a token"));
    }
    let value = &line[colon + 1..];
    if value.iter().any(|b| b.is_ascii_control() && *b != b'\t') {
        return Err(bad("a header value has control characters"));
    }
    let blank = |b: &u8| matches!(b, b' ' | b'\t');
    let left = value.iter().take_while(|b| blank(b)).count();
    let right = value.iter().rev().take_while(|b| blank(b)).count().min(value.len() - left);
    Ok([start, start + colon, start + colon + 1 + left, end - right])
}

/// A token's characters (RFC 9110, section 5.6.2).
pub fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn verdict(head: &str) -> u16 {
        match Head::parse(head.as_bytes()) {
            Ok(Some(head)) => head.fault.map_or(200, |e| e.code.status()),
            Ok(None) => 0,
            Err(e) => e.code.status(),
        }
    }

    #[test]
    fn a_plain_head_is_read() {
        let text = "POST /api/ask?x=1&y HTTP/1.1\r\nHost: a:1\r\nContent-Length: 5\r\nX-Name:  v \r\n\r\nhello";
        let head = Head::parse(text.as_bytes()).expect("no rule broken").expect("complete");
        assert_eq!((head.method(), head.path(), head.query()), ("POST", "/api/ask", "x=1&y"));
        assert_eq!(head.field("x-NAME"), Some("v"));
        assert_eq!(head.framing, Framing::Length(5));
        assert_eq!(head.len(), text.len() - 5);
        assert!(!head.close);
    }

    #[test]
    fn a_value_that_is_no_text_is_not_taken_for_a_missing_one() {
        let head = Head::parse(b"GET / HTTP/1.1\r\nHost: a\r\nA: \xe9\r\nB: \xc3\xa9\r\n\r\n");
        let head = head.expect("no rule broken").expect("complete");
        assert_eq!([head.field("a"), head.field("b"), head.field("c")], [Some("\u{fffd}"), Some("\u{e9}"), None]);
    }

    #[test]
    fn close_is_one_of_the_options_of_a_connection() {
        for (version, options, close) in [
            ("1.1", "close", true),
            ("1.1", "keep-alive, Close", true),
            ("1.1", "x,\tclose ,y", true),
            ("1.1", "close-notify", false),
            ("1.1", "keep-alive", false),
            ("1.0", "x", true),
            ("1.0", "x, Keep-Alive", false),
            ("1.0", "keep-alive, close", true),
        ] {
            let text = format!("GET / HTTP/{version}\r\nHost: a\r\nConnection: {options}\r\n\r\n");
            let head = Head::parse(text.as_bytes()).expect("no rule broken").expect("complete");
            assert_eq!(head.close, close, "{version} {options:?}");
        }
    }

    #[test]
    fn every_prefix_of_a_good_head_is_incomplete() {
        let text = "GET http://a/x HTTP/1.1\r\nHost: a\r\nA: b\r\n\r\n";
        for end in 0..text.len() {
            assert_eq!(verdict(&text[..end]), 0, "{:?}", &text[..end]);
        }
        assert_eq!(verdict(text), 200);
    }

    /// `tests/it/attacks.rs` has many more.
    #[test]
    fn a_head_that_is_odd_is_judged_for_what_it_is() {
        for (head, status) in [
            ("GET HTTPS://a/livez HTTP/1.1\r\nHost: a\r\n\r\n", 200),
            ("GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", 200),
            ("GET http:// HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET http://a?x=/livez HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET http://a#/livez HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("PRI * HTTP/2.0\r\n\r\n", 505),
            ("G\u{16}T", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n", 200),
        ] {
            assert_eq!(verdict(head), status, "{head:?}");
        }
    }

    #[test]
    fn limits_hold_whether_or_not_the_head_ends() {
        let long = "a".repeat(MAX_HEAD);
        assert_eq!(verdict(&format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", &long[..MAX_TARGET])), 414);
        assert_eq!(verdict(&format!("GET /{long}")), 414);
        assert_eq!(verdict(&format!("GET / HTTP/1.1\r\nHost: a\r\nA: {long}")), 431);
        assert_eq!(verdict(&format!("GET / HTTP/1.1\r\nHost: a\r\nA: {long}\r\n\r\n")), 431);
        let many = "A: b\r\n".repeat(MAX_FIELDS);
        assert_eq!(verdict(&format!("GET / HTTP/1.1\r\n{many}")), 0);
        assert_eq!(verdict(&format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")), 431);
    }

    /// Heads that are nearly right.
    fn heads() -> impl Strategy<Value = Vec<u8>> {
        let lines: Vec<&[u8]> = vec![
            b"Host: a\r\n",
            b"host:a:1\r\n",
            b"Content-Length: 5\r\n",
            b"Transfer-Encoding: Chunked\r\n",
            b"Connection: keep-alive, close\r\n",
            b"Expect: 100-continue\r\n",
            b"X-Y_1:\r\n",
            b"a:  b c  \r\n",
            b"x.y: \t\xc3\xa9\t z \t\r\n",
            b" folded\r\n",
            b"no colon\r\n",
            b"bare: lf\n",
            b"bare: \r",
        ];
        let start =
            prop::sample::select(vec![&b"GET / HTTP/1.1\r\n"[..], b"POST /a?b HTTP/1.0\r\n", b"PUT http://h/p HTTP/1.1\r\n"]);
        let lines = prop::collection::vec(prop::sample::select(lines), 0..5);
        let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..2);
        (start, lines, damage).prop_map(|(start, lines, damage)| {
            let mut head = [start, &lines.concat(), b"\r\nbody"].concat();
            for (at, byte) in damage {
                *at.get_mut(&mut head) = byte;
            }
            head
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_verdict_stands_whatever_follows(head in heads()) {
            let whole = Head::parse(&head).map(|head| head.map(|head| head.len()));
            for end in 0..head.len() {
                match (Head::parse(&head[..end]), &whole) {
                    (Ok(None), _) => {}
                    (Ok(Some(early)), Ok(Some(len))) => prop_assert_eq!(early.len(), *len),
                    (Err(early), Err(e)) => prop_assert_eq!(early.code.status(), e.code.status()),
                    (early, _) => prop_assert!(false, "{:?} after {} bytes, {:?} in the end", early, end, whole),
                }
            }
        }

        #[test]
        fn what_is_taken_means_the_same_to_another_parser(bytes in heads()) {
            let Ok(Some(head @ Head { fault: None, .. })) = Head::parse(&bytes) else { return Ok(()) };
            let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
            let mut other = httparse::Request::new(&mut fields);
            prop_assert_eq!(other.parse(&bytes), Ok(httparse::Status::Complete(head.len())));
            prop_assert_eq!((other.method, other.version), (Some(head.method()), Some(u8::from(!head.http10))));
            prop_assert!(other.path.is_some_and(|target| target.ends_with(head.path().split_at(1).1) || head.query() != ""));
            prop_assert_eq!(other.headers.len(), head.fields.len());
            for (theirs, ours) in other.headers.iter().zip(&head.fields) {
                prop_assert_eq!((theirs.name.as_bytes(), theirs.value), (&head.bytes[ours[0]..ours[1]], &head.bytes[ours[2]..ours[3]]));
            }
        }
    }
}
