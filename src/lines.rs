//! The log's way to stdout: whole lines, each after the time, and several in one write where they come together.
//! Knows nothing of what they say.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec};
use simplelog::{ConfigBuilder, LevelPadding, WriteLogger};

use crate::clock;

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
    let is_file = |stdout: std::os::fd::OwnedFd| File::from(stdout).metadata().is_ok_and(|metadata| metadata.is_file());
    let always_has_room = io::stdout().as_fd().try_clone_to_owned().is_ok_and(is_file);
    let _ = WriteLogger::init(level, config, Lines { always_has_room, ..Lines::default() });
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
    /// Whole lines that are not written yet, and the beginning of one.
    text: Vec<u8>,
    count: u64,
    lost: u64,
    is_midway: bool,
    always_has_room: bool,
}

impl Lines {
    /// How long the first lines wait that find no room.
    const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    /// No more than this waits for other lines.
    const MOST: usize = 16 * 1024;

    fn has_room(&self) -> bool {
        if self.always_has_room {
            return true;
        }
        let patience = if self.lost == 0 { Lines::PATIENCE } else { Timespec::default() };
        let stdout = io::stdout();
        // What cannot be asked, such as a closed stdout, will say so when it is written to.
        rustix::event::poll(&mut [PollFd::new(&stdout, PollFlags::OUT)], Some(&patience)).unwrap_or(1) > 0
    }

    fn write_out(&mut self) -> io::Result<()> {
        if !self.has_room() {
            self.lost += std::mem::take(&mut self.count);
            self.text.clear();
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        if self.lost > 0 {
            let lost = std::mem::take(&mut self.lost);
            writeln!(stdout, "{} [WARN] {lost} lines of the log are lost: nobody read stdout", clock::now())?;
        }
        let result = stdout.write_all(&self.text).and_then(|()| stdout.flush());
        self.count = 0;
        self.text.clear();
        result
    }
}

impl Write for Lines {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if !self.is_midway {
            self.text.extend_from_slice(clock::now().as_bytes());
            self.text.push(b' ');
        }
        self.text.extend_from_slice(piece);
        self.is_midway = !piece.ends_with(b"\n");
        if !self.is_midway {
            self.count += 1;
            if !TOGETHER.get() || self.text.len() >= Lines::MOST {
                self.write_out()?;
            }
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.count > 0 { self.write_out() } else { Ok(()) }
    }
}
