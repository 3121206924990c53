//! The program's start: the command line, the settings, the log; then the server.

mod api;
mod clock;
mod config;
mod error;
mod exchange;
mod handoff;
mod http;
mod kernel;
mod metrics;
mod mock;
mod openai;
mod pool;
mod rate_limit;
mod relay;
mod server;
mod sse;
mod store;
mod upstream;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use config::Config;
use error::StartError;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ai-proxy: {}", e.message);
            ExitCode::from(e.exit)
        }
    }
}

fn run() -> Result<(), StartError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] | ["serve"] => {
            let config = Config::load()?;
            start_log(config.log_level);
            server::serve(config)
        }
        ["healthcheck"] => Config::load().and_then(|config| healthcheck(&config)).map_err(|e| StartError::machine(e.message)),
        ["--help" | "-h" | "help"] => print(&Config::help()),
        ["--version" | "-V"] => print(concat!("ai-proxy ", env!("CARGO_PKG_VERSION"), "\n")),
        _ => Err(StartError::usage(format!(
            "unknown command {:?}\nusage: ai-proxy [serve | healthcheck | --help | --version]",
            arguments.join(" ")
        ))),
    }
}

fn print(text: &str) -> Result<(), StartError> {
    std::io::stdout().write_all(text.as_bytes()).map_err(|e| StartError::machine(format!("stdout: {e}")))
}

/// One line each to stdout: RFC 3339 timestamp, level, message. A panic is such a line, too.
fn start_log(level: log::LevelFilter) {
    use simplelog::{ConfigBuilder, LevelPadding, WriteLogger};
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
    let _ = WriteLogger::init(level, config, Lines::default());
    std::panic::set_hook(Box::new(|panic| log::error!("bug: {}", panic.to_string().replace('\n', " "))));
}

/// Writes whole lines to stdout, each after the time: the logger writes them in a dozen pieces. Where nobody
/// reads stdout lines are lost, since requests are not to wait for that.
#[derive(Default)]
struct Lines {
    line: Vec<u8>,
    lost: u64,
}

impl Lines {
    /// How long the first line waits that finds no room.
    const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

    fn has_room(&self) -> bool {
        let patience = if self.lost == 0 { Lines::PATIENCE } else { Timespec::default() };
        let stdout = std::io::stdout();
        // What cannot be asked, such as a closed stdout, will say so when it is written to.
        rustix::event::poll(&mut [PollFd::new(&stdout, PollFlags::OUT)], Some(&patience)).unwrap_or(1) > 0
    }
}

impl Write for Lines {
    fn write(&mut self, piece: &[u8]) -> std::io::Result<usize> {
        if self.line.is_empty() {
            self.line.extend_from_slice(clock::now().as_bytes());
            self.line.push(b' ');
        }
        self.line.extend_from_slice(piece);
        if piece.ends_with(b"\n") {
            if !self.has_room() {
                self.lost += 1;
                self.line.clear();
                return Ok(piece.len());
            }
            let mut stdout = std::io::stdout().lock();
            if self.lost > 0 {
                let lost = std::mem::take(&mut self.lost);
                writeln!(stdout, "{} [WARN] {lost} lines of the log are lost: nobody read stdout", clock::now())?;
            }
            let result = stdout.write_all(&self.line).and_then(|()| stdout.flush());
            self.line.clear();
            result?;
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Asks the server that these settings describe for its `/livez`.
fn healthcheck(config: &Config) -> Result<(), StartError> {
    const PATIENCE: Duration = Duration::from_secs(3);
    let host = match config.host {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let address = SocketAddr::new(host, config.port);
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(format!("GET /livez HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.take(4096).read_to_string(&mut answer)?;
        Ok(answer)
    };
    match ask() {
        Ok(answer) if answer.starts_with("HTTP/1.1 200 ") => Ok(()),
        Ok(answer) => {
            Err(StartError::machine(format!("unhealthy: {address} answered {:?}", answer.lines().next().unwrap_or_default())))
        }
        Err(e) => Err(StartError::machine(format!("unhealthy: {address}: {e}"))),
    }
}
