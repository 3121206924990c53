//! The program under test: started as a user would, in a folder of its own, and looked at from outside.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rustix::process::{Pid, Signal, kill_process};

use crate::load::Call;
use crate::upstream::Upstream;

/// The unit of CPU times in `/proc`; Linux shows users this one everywhere.
const TICKS_PER_SECOND: f64 = 100.0;

pub const QUESTION: &str = "What is a reverse proxy, and why is it useful?";

const KEY: &str = "Authorization: Bearer bench-secret\r\n";

/// A folder on the disk that `target` is on, gone with its owner.
pub struct Folder(PathBuf);

impl Folder {
    /// Not in `/tmp`, which may be memory, where a sync costs nothing.
    pub fn new() -> Folder {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gateway-bench");
        // A run that was interrupted left its own.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a folder in target/tmp");
        Folder(path)
    }

    /// A folder of this name inside, made where it is missing.
    pub fn room(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(&path).expect("a folder in target/tmp");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub struct Proxy {
    child: Child,
    folder: PathBuf,
    pub address: SocketAddr,
}

impl Proxy {
    /// Starts it as shipped but for these settings, with one key and its log in a file.
    pub fn start(folder: &Path, upstream: &Upstream, settings: &[(&str, &str)]) -> Proxy {
        let log = folder.join("log");
        let file = File::create(&log).expect("a log file");
        let child = Command::new(env!("CARGO_BIN_EXE_ai-proxy"))
            .current_dir(folder)
            .env_clear()
            .env("PORT", "0")
            .env("DATABASE_PATH", "history.db")
            .env("API_KEYS", "bench:bench-secret,other:other-secret")
            .env("OPENAI_BASE_URL", format!("http://{}/v1", upstream.address))
            .env("OPENAI_API_KEY", "sk-bench")
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stderr(file.try_clone().expect("a second handle"))
            .stdout(file)
            .spawn()
            .expect("the program starts");
        let mut proxy = Proxy { child, folder: folder.into(), address: SocketAddr::from(([127, 0, 0, 1], 0)) };
        let started = Instant::now();
        loop {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let rest = said.split_once("listening on http://127.0.0.1:").and_then(|(_, rest)| rest.split_once('\n'));
            if let Some(port) = rest.and_then(|(port, _)| port.parse().ok()) {
                proxy.address.set_port(port);
                return proxy;
            }
            let ended = proxy.child.try_wait().expect("a child of ours").is_some();
            assert!(!ended && started.elapsed() < Duration::from_secs(20), "the program did not start: {said}");
            thread::sleep(Duration::from_micros(200));
        }
    }

    pub fn ask(&self) -> Call {
        Call::post(self.address, "/api/ask", KEY, &format!(r#"{{"question":"{QUESTION}"}}"#))
    }

    pub fn stream(&self, chunks: u32) -> Call {
        Call::post(self.address, "/api/streaming", KEY, &format!(r#"{{"question":"{QUESTION}"}}"#)).of_chunks(chunks)
    }

    pub fn history(&self, query: &str) -> Call {
        Call::get(self.address, &format!("/api/history?{query}"), KEY)
    }

    /// CPU time used so far, in seconds.
    pub fn cpu(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        // The second field is the name in brackets, which may contain anything; utime and stime are 14 and 15.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok());
        ticks.sum::<f64>() / TICKS_PER_SECOND
    }

    /// Memory in MiB: `VmRSS` now, `VmHWM` at its peak.
    pub fn memory(&self, what: &str) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.unwrap_or(f64::NAN) / 1024.0
    }

    pub fn database(&self) -> PathBuf {
        self.folder.join("history.db")
    }

    /// Waits until it has nothing left to do: until the words of all pairs are indexed.
    pub fn settle(&self) {
        let database = Connection::open(self.database()).expect("the database opens");
        let left = "SELECT (SELECT coalesce(max(id), 0) FROM history) - up_to FROM indexed";
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(60) {
            match database.query_row(left, [], |row| row.get::<_, i64>(0)) {
                Ok(0) => return,
                _ => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Ends it in good order.
    pub fn stop(mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(20) && !matches!(self.child.try_wait(), Ok(Some(_))) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
