//! What is sent to the upstream and what comes from it, for as long as ureq has not taken it. Knows bytes only.

use std::fmt;

use ureq::unversioned::transport::Buffers;

/// Buffers that a stream of minutes can keep: ureq's own take 10 KiB more, to copy a chunked request body
/// through, which no request here has.
#[derive(Default)]
pub struct SmallBuffers {
    pub output: Vec<u8>,
    /// Written but not sent: ureq writes head and body one after the other, and one packet costs the
    /// upstream and us half of two.
    pub unsent: usize,
    input: Vec<u8>,
    filled: usize,
    consumed: usize,
    progress: bool,
}

impl SmallBuffers {
    /// Made for what is sent and not kept, so that it may be large: a header field must fit as a whole, and some keys have
    /// thousands of characters.
    const OUTPUT: usize = 16 * 1024;
    /// With less room than this it is sent, so that a header field finds enough.
    const ROOM: usize = 2 * 1024;
    const INPUT: usize = 1024;
    /// More than the largest head that ureq takes; what needs more than that at once is nothing sane.
    const MOST_INPUT: usize = 128 * 1024;

    /// What is unsent has to be sent, to make room.
    pub fn is_full(&self) -> bool {
        Self::OUTPUT - self.unsent < Self::ROOM
    }
}

impl Buffers for SmallBuffers {
    fn output(&mut self) -> &mut [u8] {
        if self.output.is_empty() {
            self.output = vec![0; Self::OUTPUT];
        }
        &mut self.output[self.unsent..]
    }

    fn input(&self) -> &[u8] {
        &self.input[self.consumed..self.filled]
    }

    fn input_append_buf(&mut self) -> &mut [u8] {
        if self.consumed > 0 {
            self.input.copy_within(self.consumed..self.filled, 0);
            self.filled -= self.consumed;
            self.consumed = 0;
        }
        if self.filled == self.input.len() && self.filled < Self::MOST_INPUT {
            self.input.resize((2 * self.input.len()).max(Self::INPUT), 0);
        }
        &mut self.input[self.filled..]
    }

    fn input_appended(&mut self, amount: usize) {
        self.filled += amount;
    }

    fn input_consume(&mut self, amount: usize) {
        self.progress = amount > 0;
        self.consumed += amount;
    }

    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        self.input_append_buf();
        self.output();
        (&mut self.input[self.filled..], &mut self.output[self.unsent..])
    }

    fn can_use_input(&self) -> bool {
        self.progress && self.filled > self.consumed
    }
}

/// Without the bytes: a key is among them.
impl fmt::Debug for SmallBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SmallBuffers")
    }
}
