//! The program under test: started on a free port with a clean environment and a folder of its own.

use super::PATIENCE;
use super::client::{self, Connection, Request, Response, Stream};
use super::folder::Folder;
use super::upstream::FakeUpstream;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The key that the program sends to its upstream. It may appear nowhere else.
pub const UPSTREAM_KEY: &str = "sk-upstream-0123456789abcdef";

/// What a program is started with. Kept by the running one, so that it can be started again.
#[derive(Clone)]
pub struct Setup {
    settings: Vec<(OsString, OsString)>,
    folder: Arc<Folder>,
    /// Shell commands before the start, such as `ulimit -n 64`.
    before: String,
}

impl Setup {
    /// Mock mode without delay, a free port, a database in a folder of its own.
    pub fn new() -> Setup {
        let folder = Arc::new(Folder::new());
        let database = folder.path().join("history.db");
        let bare = Setup { settings: Vec::new(), folder, before: String::new() };
        bare.set("PORT", "0").set("MOCK_DELAY_MS", "0").set("DATABASE_PATH", database)
    }

    pub fn set(self, name: &str, value: impl AsRef<OsStr>) -> Setup {
        let mut setup = self.unset(name);
        setup.settings.push((name.into(), value.as_ref().into()));
        setup
    }

    pub fn unset(mut self, name: &str) -> Setup {
        self.settings.retain(|(known, _)| known != name);
        self
    }

    /// Asks this upstream instead of the mock, and once only.
    pub fn facing(self, upstream: &FakeUpstream) -> Setup {
        self.set("OPENAI_BASE_URL", upstream.url()).set("OPENAI_API_KEY", UPSTREAM_KEY).set("UPSTREAM_RETRIES", "0")
    }

    /// Starts the program from a shell that has run these commands, such as `ulimit -n 64`.
    pub fn after(self, commands: &str) -> Setup {
        Setup { before: commands.into(), ..self }
    }

    /// Puts a file into the folder that the program runs in.
    pub fn file(self, name: &str, content: &str) -> Setup {
        std::fs::write(self.folder().join(name), content).expect("a file in the temporary folder");
        self
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs a command that is expected to end by itself.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Ended {
        let mut program = Program::start(self, arguments);
        let status = program.wait_for_exit(PATIENCE);
        Ended { status, stdout: program.stdout.so_far(), stderr: program.stderr.so_far() }
    }

    #[track_caller]
    pub fn start(self) -> Proxy {
        self.start_as(&[])
    }

    #[track_caller]
    pub fn start_as(self, arguments: &[&str]) -> Proxy {
        self.try_start(arguments).unwrap_or_else(|ended| panic!("the server did not start: {ended:#?}"))
    }

    /// Starts the server and waits until it says where it listens. Errs with how it ended instead.
    #[track_caller]
    pub fn try_start(self, arguments: &[&str]) -> Result<Proxy, Ended> {
        let mut program = Program::start(&self, arguments);
        let Some(line) = program.stdout.wait_for(|line| line.contains("listening on http://")) else {
            let _ = program.child.kill();
            let status = program.wait_for_exit(PATIENCE);
            return Err(Ended { status, stdout: program.stdout.so_far(), stderr: program.stderr.so_far() });
        };
        let port = line.rsplit(':').next().and_then(|port| port.trim().trim_end_matches('/').parse().ok());
        let port: u16 = port.unwrap_or_else(|| panic!("no port in: {line}"));
        Ok(Proxy { program, setup: self, address: SocketAddr::from(([127, 0, 0, 1], port)) })
    }
}

/// How a command ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: Vec<String>,
    pub stderr: Vec<String>,
}

impl Ended {
    /// The one line that a refusal consists of.
    #[track_caller]
    pub fn expect_refusal(&self, code: i32) -> &str {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        assert!(!self.stdout.iter().any(|line| line.contains("listening")), "it served: {self:?}");
        assert_eq!(self.stderr.len(), 1, "one line on stderr: {self:?}");
        &self.stderr[0]
    }
}

/// A running server.
pub struct Proxy {
    program: Program,
    setup: Setup,
    pub address: SocketAddr,
}

impl Proxy {
    /// In mock mode.
    #[track_caller]
    pub fn start() -> Proxy {
        Setup::new().start()
    }

    pub fn with(settings: &[(&str, &str)]) -> Setup {
        settings.iter().fold(Setup::new(), |setup, (name, value)| setup.set(name, value))
    }

    /// A setup that asks this upstream, once only.
    pub fn facing(upstream: &FakeUpstream) -> Setup {
        Setup::new().facing(upstream)
    }

    pub fn connect(&self) -> Connection {
        Connection::open(self.address)
    }

    /// One request on a connection of its own.
    #[track_caller]
    pub fn call(&self, request: &Request) -> Response {
        self.connect().exchange(request)
    }

    #[track_caller]
    pub fn get(&self, target: &str) -> Response {
        self.call(&client::get(target))
    }

    #[track_caller]
    pub fn ask(&self, question: &str) -> Response {
        self.call(&client::post("/api/ask", &json!({ "question": question })))
    }

    /// The answer to a question that must succeed.
    #[track_caller]
    pub fn answer(&self, question: &str) -> Value {
        let response = self.ask(question);
        assert_eq!(response.status, 200, "{response:?}");
        response.json()
    }

    /// A stream whose status was 200. Blocks until the first event, as the server does.
    #[track_caller]
    pub fn stream(&self, question: &str) -> Stream {
        let stream = self.connect().stream(&client::streaming(question));
        assert_eq!(stream.head.status, 200, "{:?}", stream.head);
        stream
    }

    /// All pairs that the caller without a key can see, newest first.
    #[track_caller]
    pub fn history(&self) -> Vec<Value> {
        let response = self.get("/api/history?limit=1000");
        assert_eq!(response.status, 200, "{response:?}");
        response.json()["items"].as_array().expect("items").clone()
    }

    /// The newest pair, once there are `count` of them: a cut stream is stored a little later than its client is gone.
    #[track_caller]
    pub fn newest_of(&self, count: usize) -> Value {
        super::eventually("the rows are in the history", || self.history().len() >= count);
        let items = self.history();
        assert_eq!(items.len(), count, "{items:?}");
        items[0].clone()
    }

    pub fn database_path(&self) -> PathBuf {
        self.setup.folder().join("history.db")
    }

    /// Looks into the database the way the sqlite3 shell would, also while the server runs.
    pub fn database(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(self.database_path()).expect("the database opens")
    }

    /// The database is whole, as SQLite sees it.
    #[track_caller]
    pub fn expect_intact(&self) {
        let check: String = self.database().query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("a check");
        assert_eq!(check, "ok");
    }

    pub fn count_rows(&self) -> i64 {
        let count = self.database().query_row("SELECT count(*) FROM history", [], |row| row.get(0));
        count.expect("the rows can be counted")
    }

    /// Every line of stdout that was read so far. The last ones may be on their way: what must be there is waited for,
    /// what must not be is looked for in the whole log.
    pub fn log(&self) -> Vec<String> {
        self.program.stdout.so_far()
    }

    /// Every line that it wrote to stdout; ends it in good order first.
    #[track_caller]
    pub fn whole_log(&mut self) -> Vec<String> {
        if !self.program.readers.is_empty() {
            self.stop();
        }
        self.log()
    }

    /// Ends it in good order; no line that it wrote is like this.
    #[track_caller]
    pub fn expect_no_line(&mut self, unwanted: impl Fn(&str) -> bool) {
        let lines = self.whole_log();
        assert!(!lines.iter().any(|line| unwanted(line)), "{lines:#?}");
    }

    pub fn stderr(&self) -> Vec<String> {
        self.program.stderr.so_far()
    }

    #[track_caller]
    pub fn wait_for_line(&self, wanted: impl Fn(&str) -> bool) -> String {
        match self.program.stdout.wait_for(wanted) {
            Some(line) => line,
            None => panic!("no such line in {:#?}", self.log()),
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.program.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the process can be signalled");
    }

    /// Waits for the end of the process. Its whole log can be read afterwards.
    #[track_caller]
    pub fn wait_for_exit(&mut self, bound: Duration) -> ExitStatus {
        self.program.wait_for_exit(bound)
    }

    /// Ends it in good order.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        let status = self.wait_for_exit(PATIENCE);
        assert_eq!(status.code(), Some(0), "{:#?} {:#?}", self.log(), self.stderr());
    }

    /// `kill -9`
    #[track_caller]
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait_for_exit(PATIENCE);
    }

    /// The same setup and the same database, to be started again.
    pub fn setup(&self) -> Setup {
        self.setup.clone()
    }
}

/// The child process and what it writes.
struct Program {
    child: Child,
    stdout: Lines,
    stderr: Lines,
    readers: Vec<JoinHandle<()>>,
}

impl Program {
    fn start(setup: &Setup, arguments: &[&str]) -> Program {
        const PROGRAM: &str = env!("CARGO_BIN_EXE_ai-proxy");
        let mut command = Command::new(if setup.before.is_empty() { PROGRAM } else { "/bin/sh" });
        if !setup.before.is_empty() {
            command.args(["-c", &format!("{} && exec \"$0\" \"$@\"", setup.before), PROGRAM]);
        }
        let mut child = command
            .args(arguments)
            .current_dir(setup.folder())
            .env_clear()
            .envs(setup.settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let (stdout, stderr) = (Lines::default(), Lines::default());
        let readers =
            vec![stdout.read_from(child.stdout.take().expect("stdout")), stderr.read_from(child.stderr.take().expect("stderr"))];
        Program { child, stdout, stderr, readers }
    }

    #[track_caller]
    fn wait_for_exit(&mut self, bound: Duration) -> ExitStatus {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                break status;
            }
            assert!(started.elapsed() < bound, "still running: {:#?}", self.stdout.so_far());
            std::thread::sleep(Duration::from_millis(5));
        };
        for reader in self.readers.drain(..) {
            reader.join().expect("the output was read");
        }
        status
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("stdout: {:#?}\nstderr: {:#?}", self.stdout.so_far(), self.stderr.so_far());
        }
    }
}

/// The lines of one output as they come.
#[derive(Clone, Default)]
struct Lines(Arc<(Mutex<Written>, Condvar)>);

#[derive(Default)]
struct Written {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    fn read_from(&self, output: impl Read + Send + 'static) -> JoinHandle<()> {
        let lines = self.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                lines.0.0.lock().unwrap().lines.push(String::from_utf8_lossy(&line).into_owned());
                lines.0.1.notify_all();
            }
            lines.0.0.lock().unwrap().ended = true;
            lines.0.1.notify_all();
        })
    }

    fn so_far(&self) -> Vec<String> {
        self.0.0.lock().unwrap().lines.clone()
    }

    /// The first line wanted; none where the output ends, or nothing like it comes in time.
    fn wait_for(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let started = Instant::now();
        let mut state = self.0.0.lock().unwrap();
        loop {
            if let Some(line) = state.lines.iter().find(|line| wanted(line)) {
                return Some(line.clone());
            }
            let left = PATIENCE.saturating_sub(started.elapsed());
            if state.ended || left.is_zero() {
                return None;
            }
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
    }
}
