//! The log's way to stdout: whole lines, each after the time, and several in one write where they come together.
//! Knows nothing of what they say.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
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
    let _ = WriteLogger::init(level, config, Lines { out: stdout().ok(), ..Lines::default() });
    std::panic::set_hook(Box::new(|panic| log::error!("bug: {}", panic.to_string().replace('\n', " "))));
}

/// Not std's, whose buffer would repeat what failed. A terminal, which may be stopped (Ctrl-S), is opened anew if
/// possible: O_NONBLOCK on the inherited one would hold for all who share it.
fn stdout() -> io::Result<File> {
    let stdout = io::stdout();
    if stdout.is_terminal() {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(terminal) = rustix::fs::open("/proc/self/fd/1", flags, Mode::empty()) {
            return Ok(File::from(terminal));
        }
    }
    stdout.as_fd().try_clone_to_owned().map(File::from)
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
    out: Option<File>,
    /// Whole lines that are not written yet.
    text: Vec<u8>,
    /// The beginning of one more.
    line: Vec<u8>,
    lost: u64,
    /// When lines were lost last.
    lost_at: Option<Instant>,
    /// The last write ended in the midst of a line.
    is_torn: bool,
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

    /// Until when a write may wait.
    fn patience(&self) -> Instant {
        let is_impatient = self.lost_at.is_some_and(|at| at.elapsed() < Lines::A_WHILE);
        Instant::now() + if is_impatient { Duration::ZERO } else { Lines::PATIENCE }
    }

    fn has_room(&self) -> bool {
        let Some(out) = &self.out else { return true };
        // What cannot be asked, such as a closed stdout, will say so when it is written to.
        kernel::poll(&mut [PollFd::new(out, PollFlags::OUT)], Some(self.patience())).unwrap_or(true)
    }

    /// Writes the text; how many bytes of it went out.
    fn put(&self) -> usize {
        const GLANCE: Duration = Duration::from_millis(5);
        let (mut written, mut until) = (0, None);
        let Some(mut out) = self.out.as_ref() else { return 0 };
        while written < self.text.len() {
            match out.write(&self.text[written..]) {
                Ok(more @ 1..) => written += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Only a terminal says so, and poll(2) says that it has room while it is stopped.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if Instant::now() >= *until.get_or_insert_with(|| self.patience()) {
                        break;
                    }
                    thread::sleep(GLANCE);
                }
                _ => break,
            }
        }
        written
    }

    fn write_out(&mut self) {
        let mut told = 0;
        if self.has_room() {
            let mut before = if self.is_torn { "\n".to_string() } else { String::new() };
            if self.lost > 0 {
                let (now, lost) = (clock::now(), self.lost);
                before.push_str(&format!("{now} [WARN] {lost} lines of the log are lost: stdout did not take them\n"));
            }
            self.text.splice(..0, before.bytes());
            let written = self.put();
            if written >= before.len() {
                self.lost = 0;
            }
            self.is_torn = self.text[..written].last().map_or(self.is_torn, |last| *last != b'\n');
            told = written.max(before.len());
        }
        let lost = self.text[told..].iter().filter(|byte| **byte == b'\n').count() as u64;
        if lost > 0 {
            self.lost += lost;
            self.lost_at = Some(Instant::now());
        }
        self.text.clear();
    }

    /// Ends the line; one that is too long for a write of its own is cut.
    fn end_line(&mut self) {
        let most = Lines::AT_ONCE - Lines::RESERVE;
        if self.line.len() > most {
            self.line.truncate(most - "…\n".len());
            // The cut may have gone through a character.
            let whole = self.line.utf8_chunks().next().map_or(0, |chunk| chunk.valid().len());
            self.line.truncate(whole);
            self.line.extend_from_slice("…\n".as_bytes());
        }
        if self.text.len() + self.line.len() > most {
            self.write_out();
        }
        self.text.append(&mut self.line);
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
            self.end_line();
            if !TOGETHER.get() {
                self.write_out();
            }
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.text.is_empty() {
            self.write_out();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that takes so many bytes, as on a disk that is full then.
    #[test]
    fn what_is_not_taken_is_told_and_no_line_goes_on_in_another() {
        let path = std::env::temp_dir().join(format!("ai-proxy-lines-{}", std::process::id()));
        let file = |path| File::options().create(true).append(true).open(path).expect("a file");
        let full = || File::options().write(true).open("/dev/full").expect("a full device");
        let mut lines = Lines { out: Some(file(&path)), ..Lines::default() };
        TOGETHER.set(false);
        let log = |lines: &mut Lines, text: &str| lines.write_all(text.as_bytes()).expect("it never fails");
        log(&mut lines, "one\n");
        let open = lines.out.replace(full());
        log(&mut lines, "two\n");
        log(&mut lines, "three\n");
        assert_eq!(lines.lost, 2);
        // As after a write that took half a line.
        lines.out = open;
        lines.is_torn = true;
        log(&mut lines, "four\n");
        log(&mut lines, "five\n");
        let written = std::fs::read_to_string(&path).expect("it was written");
        let _ = std::fs::remove_file(&path);
        let ends: Vec<&str> = written.lines().map(|line| line.rsplit(' ').next().unwrap_or_default()).collect();
        assert_eq!(ends, ["one", "", "them", "four", "five"], "{written}");
        assert!(written.contains(" 2 lines of the log are lost") && lines.lost == 0 && !lines.is_torn, "{written}");
    }

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
