//! The log's way to stdout: whole lines, each after the time, and several in one write where they come together.
//! Knows nothing of what they say.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use simplelog::{ConfigBuilder, LevelPadding, WriteLogger};

use crate::{clock, kernel};

thread_local! {
    /// This thread's lines wait for one another.
    static TOGETHER: Cell<bool> = const { Cell::new(false) };
}

/// Starts the log: a line each, RFC 3339 timestamp, level, message. A panic is such a line, too.
pub fn start(level: log::LevelFilter) {
    let off = log::LevelFilter::Off;
    let config = ConfigBuilder::new()
        .set_time_level(off)
        .set_level_padding(LevelPadding::Off)
        .set_thread_level(off)
        .set_target_level(off)
        .set_location_level(off)
        // Other crates' lines know nothing of what must not be logged.
        .add_filter_allow_str("ai_proxy")
        .build();
    let stdout = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    let is_file = stdout.and_then(|stdout| stdout.metadata()).is_ok_and(|metadata| metadata.is_file());
    let _ = WriteLogger::init(level, config, Lines { is_file, ..Lines::default() });
    std::panic::set_hook(Box::new(|panic| log::error!("bug: {}", panic.to_string().replace('\n', " "))));
}

/// Writes the lines that `work` logs in this thread in one go, after it.
pub fn together<T>(work: impl FnOnce() -> T) -> T {
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            TOGETHER.set(false);
            log::logger().flush();
        }
    }
    TOGETHER.set(true);
    let _end = End;
    work()
}

/// Where the logger writes, in a dozen pieces a line. Where nobody reads stdout lines are lost, since requests are
/// not to wait for that.
#[derive(Default)]
struct Lines {
    /// Whole lines that are not written yet.
    text: Vec<u8>,
    count: u64,
    /// The beginning of one more.
    line: Vec<u8>,
    lost: u64,
    /// When lines were lost last.
    lost_at: Option<Instant>,
    is_file: bool,
}

impl Lines {
    /// How long lines wait for room, where none were lost for a while: a reader that is always slow must not slow
    /// down everything.
    const PATIENCE: Duration = Duration::from_millis(200);
    const A_WHILE: Duration = Duration::from_secs(60);
    /// What is written at once: a pipe that has room for anything takes so much, and takes it whole (PIPE_BUF, pipe(7)).
    const AT_ONCE: usize = 4096;
    /// Room for the line that says how many were lost.
    const RESERVE: usize = 128;

    fn has_room(&self) -> bool {
        if self.is_file {
            return true;
        }
        let is_impatient = self.lost_at.is_some_and(|at| at.elapsed() < Lines::A_WHILE);
        let patience = if is_impatient { Duration::ZERO } else { Lines::PATIENCE };
        let stdout = io::stdout();
        // What cannot be asked, such as a closed stdout, will say so when it is written to.
        kernel::poll(&mut [PollFd::new(&stdout, PollFlags::OUT)], Some(Instant::now() + patience)).unwrap_or(true)
    }

    fn write_out(&mut self) -> io::Result<()> {
        let count = std::mem::take(&mut self.count);
        if !self.has_room() {
            self.lost += count;
            self.lost_at = Some(Instant::now());
            self.text.clear();
            return Ok(());
        }
        if self.lost > 0 {
            let lost = std::mem::take(&mut self.lost);
            let said = format!("{} [WARN] {lost} lines of the log are lost: nobody read stdout\n", clock::now());
            self.text.splice(..0, said.into_bytes());
        }
        let mut stdout = io::stdout().lock();
        let result = stdout.write_all(&self.text).and_then(|()| stdout.flush());
        self.text.clear();
        result
    }

    /// Ends the line; one that is too long for a write of its own is cut.
    fn end_line(&mut self) -> io::Result<()> {
        let most = Lines::AT_ONCE - Lines::RESERVE;
        if self.line.len() > most {
            self.line.truncate(most - "…\n".len());
            // The cut may have gone through a character.
            let whole = self.line.utf8_chunks().next().map_or(0, |chunk| chunk.valid().len());
            self.line.truncate(whole);
            self.line.extend_from_slice("…\n".as_bytes());
        }
        let result = if self.text.len() + self.line.len() > most { self.write_out() } else { Ok(()) };
        self.text.append(&mut self.line);
        self.count += 1;
        result
    }
}

impl Write for Lines {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if self.line.is_empty() {
            self.line.extend_from_slice(clock::now().as_bytes());
            self.line.push(b' ');
        }
        self.line.extend_from_slice(piece);
        if piece.ends_with(b"\n") {
            self.end_line()?;
            if !TOGETHER.get() {
                self.write_out()?;
            }
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.count > 0 { self.write_out() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_cut_between_two_characters() {
        for shift in 0..4 {
            let mut lines = Lines::default();
            TOGETHER.set(true);
            for piece in [&"-".repeat(shift), &"日本語".repeat(1000), " end", "\n"] {
                lines.write_all(piece.as_bytes()).expect("nothing is written yet");
            }
            let text = String::from_utf8(lines.text).expect("whole characters");
            assert!(text.ends_with("…\n") && (Lines::AT_ONCE - 140..=Lines::AT_ONCE - 128).contains(&text.len()), "{text}");
        }
    }
}
