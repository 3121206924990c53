//! The program's start: the command line and the settings; then the server.

mod api;
mod clock;
mod config;
mod error;
mod exchange;
mod http;
mod json;
mod kernel;
mod lock;
mod logging;
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

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use config::Config;
use error::StartError;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // `eprintln!` panics where stderr takes nothing.
            let _ = writeln!(std::io::stderr(), "ai-proxy: {}", e.message);
            ExitCode::from(e.exit)
        }
    }
}

fn run() -> Result<(), StartError> {
    let arguments: Vec<String> = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] | ["serve"] => {
            let config = Config::load()?;
            logging::start(config.log_level);
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

/// Asks the server that these settings describe for its `/livez`.
fn healthcheck(config: &Config) -> Result<(), StartError> {
    const PATIENCE: Duration = Duration::from_secs(3);
    let at = |host: IpAddr| SocketAddr::new(host, config.port);
    let address = at(if config.host.is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { config.host });
    // At :: IPv4 comes in, too, unless the kernel is told otherwise (net.ipv6.bindv6only); ::1 may not be there, as in
    // containers without IPv6.
    let other = (config.host == Ipv6Addr::UNSPECIFIED).then(|| at(Ipv6Addr::LOCALHOST.into()));
    let ask = || -> std::io::Result<String> {
        let connect = |address| TcpStream::connect_timeout(&address, PATIENCE);
        let mut stream = connect(address).or_else(|e| other.and_then(|other| connect(other).ok()).ok_or(e))?;
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
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Err(StartError::machine(format!("unhealthy: {address} did not answer within {} s", PATIENCE.as_secs())))
        }
        Err(e) => Err(StartError::machine(format!("unhealthy: {address}: {e}"))),
    }
}
