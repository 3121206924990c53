//! What the gateway costs: `cargo bench` asks a fake LLM directly and through the release binary, in turns, and
//! prints one beside the other. Needs nothing from outside; clients, gateway and fake LLM share the CPUs.
//!
//! Absolute figures are the machine's; ratios and added times are the program's. They compare runs of the same
//! round and are medians over the rounds. `cargo bench -- --quick` is coarse and takes less than a minute;
//! `cargo bench -- ask streams` runs the named sections only.

mod history;
mod load;
mod proxy;
mod report;
mod upstream;
mod wire;

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use load::{Call, Each, Measured, Plan, drive};
use proxy::{Folder, Proxy, QUESTION};
use report::{ASKS, GROWTH, Run, STREAMS, Side, Table, median, side};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use upstream::{Script, Upstream};

type Section = (&'static str, fn(&Bench));
const SECTIONS: [Section; 6] =
    [("ask", ask), ("slow", slow), ("streams", streams), ("start", start), ("growth", growth), ("clients", clients)];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --all-targets` runs this, too, with a debug build.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return println!("this measures nothing but under `cargo bench`");
    }
    let named: Vec<&str> = arguments.iter().map(String::as_str).filter(|argument| !argument.starts_with("--")).collect();
    if let Some(unknown) = named.iter().find(|name| SECTIONS.iter().all(|(known, _)| known != *name)) {
        eprintln!("no section {unknown}; there are {}", SECTIONS.map(|(name, _)| name).join(", "));
        std::process::exit(2);
    }
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });

    let began = Instant::now();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let bench = Bench { quick, folder: Folder::new(), upstream: Upstream::start() };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    println!(
        "{} CPUs, load before the start {load} (near 0, or others disturb)",
        thread::available_parallelism().map_or(0, usize::from)
    );
    for (name, section) in SECTIONS {
        if named.is_empty() || named.contains(&name) {
            bench.upstream.answer_after(Duration::ZERO);
            section(&bench);
        }
    }
    println!("\n{:.0} s in all", began.elapsed().as_secs_f64());
}

/// Asks that the upstream answers at once: what a request costs.
fn ask(bench: &Bench) {
    let (full, normal) = (bench.proxy("full", &[]), bench.proxy("normal", &[("HISTORY_SYNC", "normal")]));
    let sides = [
        bench.direct(),
        proxied("proxied", full.ask(), &full),
        proxied("proxied, HISTORY_SYNC=normal", normal.ask(), &normal),
        syncs(bench.folder.room("sync")),
    ];
    let mut table = Table::new("POST /api/ask, upstream answers at once", "connections", ASKS);
    for connections in [1, 32, 128] {
        let plan = Plan::lasting(connections, bench.pick(400, 1000));
        // Only a client that is alone waits for a sync of its own.
        let sides = if connections == 1 { &sides[..] } else { &sides[..3] };
        table.measure(connections, sides, plan, bench.pick(3, 5));
    }
    table.print("CPU: the proxy's for a request; later: to index the request's words when nothing else is to do.");
}

/// Asks that wait for the upstream, as real ones do.
fn slow(bench: &Bench) {
    let proxy = bench.proxy("slow", &[]);
    bench.upstream.answer_after(Duration::from_millis(50));
    let mut table = Table::new("POST /api/ask, upstream answers after 50 ms", "connections", ASKS);
    let plan = Plan::lasting(256, bench.pick(1000, 2000));
    table.measure(256, &[bench.direct(), proxied("proxied", proxy.ask(), &proxy)], plan, bench.pick(1, 3));
    table.print("");
}

/// Many streams at once, each chunk with the time at which it was sent.
fn streams(bench: &Bench) {
    const CHUNKS: u32 = 20;
    let mut table = Table::new("POST /api/streaming, 20 chunks each", "streams, gap", STREAMS);
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    for (connections, gap, rounds) in [(500, 100, bench.pick(1, 3)), (2000, 200, bench.pick(0, 1))] {
        // A stream takes two here, and up to four of the program's.
        if rounds == 0 || descriptors < 4 * connections as u64 + 200 {
            continue;
        }
        bench.upstream.play(Script { delay: Duration::ZERO, chunks: CHUNKS, gap: Duration::from_millis(gap) });
        let proxy = bench.proxy(&format!("streams-{connections}"), &[]);
        let direct = bench.question(r#","stream":true"#).of_chunks(CHUNKS);
        let sides = [side("direct", move |plan| Run::of(drive(&direct, plan))), proxied("proxied", proxy.stream(CHUNKS), &proxy)];
        let plan = Plan { connections, over: Duration::from_millis(2 * connections as u64), each: Each::Requests(1) };
        table.measure(format!("{connections}, {gap} ms"), &sides, plan, rounds);
    }
    table.print("Chunk delay: from the upstream's write to the client's read.");
}

/// The start with a new database, and the memory of a process that has little to do.
fn start(bench: &Bench) {
    let rounds = bench.pick(5, 11);
    let millis = (0..rounds).map(|round| {
        let (nanos, proxy) = bench.first_answer(&format!("start-{round}"));
        proxy.stop();
        nanos as f64 / 1e6
    });
    println!(
        "\n## Start\n\nTo the first answered question, new database: {:.1} ms (median of {rounds})",
        median(millis.collect())
    );
    let (_, proxy) = bench.first_answer("idle");
    thread::sleep(Duration::from_millis(1500));
    println!("Memory 1.5 s after it: {:.1} MiB", proxy.memory("VmRSS"));
}

/// The same calls on a small history and on a large one.
fn growth(bench: &Bench) {
    let sizes = [1_000, bench.pick(50_000, 1_000_000)];
    let names = sizes.map(|rows| format!("{rows} pairs"));
    let began = Instant::now();
    for (name, rows) in names.iter().zip(sizes) {
        let proxy = bench.proxy(name, &[]);
        let database = proxy.database();
        proxy.stop();
        history::fill(&database, rows);
    }
    let title = format!("Growth of the history (written in {:.0} s)", began.elapsed().as_secs_f64());
    let mut table = Table::new(&title, "call, one connection", GROWTH);
    let (rounds, one) = (bench.pick(3, 5), Plan { connections: 1, over: Duration::ZERO, each: Each::Requests(1) });

    let starts = names.each_ref().map(|name| {
        side(name, |_| {
            let (nanos, proxy) = bench.first_answer(name);
            proxy.stop();
            Run::of(Measured { latency: vec![nanos], answers: 1, ..Measured::default() })
        })
    });
    table.measure("start to the first answer", &starts, one, rounds);

    let proxies = names.each_ref().map(|name| bench.proxy(name, &[]));
    let each = |call: &dyn Fn(&Proxy, i64) -> Call| [0, 1].map(|i| proxied(&names[i], call(&proxies[i], sizes[i]), &proxies[i]));
    let queries: [(&str, &dyn Fn(i64) -> String); 4] = [
        ("limit=20", &|_| String::new()),
        ("limit=20, before= the middle", &|rows| format!("&before={}", rows / 2)),
        ("q= a word of every pair", &|_| format!("&q={}", history::COMMON)),
        ("q= a word of ten pairs", &|_| format!("&q={}", history::RARE)),
    ];
    for (label, query) in queries {
        let sides = each(&|proxy, rows| proxy.history(&format!("limit=20{}", query(rows))));
        table.measure(label, &sides, Plan::lasting(1, bench.pick(200, 500)), rounds);
    }
    // So few that the small history stays one.
    let few = Plan { each: Each::Requests(bench.pick(50, 200)), ..one };
    table.measure("ask", &each(&|proxy, _| proxy.ask()), few, rounds);
    proxies.into_iter().for_each(Proxy::stop);

    let retentions = [0, 1].map(|i| {
        let (name, keep) = (&names[i], (sizes[i] / 2).to_string());
        side(name, move |plan| {
            // Killed after it, so that it does not go on deleting while the other is measured.
            Run::of(drive(&bench.proxy(name, &[("HISTORY_MAX_ROWS", &keep)]).ask(), plan))
        })
    });
    table.measure("ask while half of them are deleted", &retentions, Plan::lasting(1, bench.pick(500, 2000)), 1);
    table.print("");
}

/// Clients that come and go, and very many requests of clients that stay.
fn clients(bench: &Bench) {
    let proxy = bench.proxy("clients", &[]);
    let sides = [bench.direct(), proxied("proxied", proxy.ask(), &proxy)];
    let mut table = Table::new("POST /api/ask, many clients and many requests", "clients", ASKS);
    let seconds = bench.pick(1, 3);
    let plan = Plan { connections: 1000 * seconds, over: Duration::from_secs(seconds as u64), each: Each::Requests(1) };
    table.measure("1000 a second: connect, ask, close", &sides, plan, 1);
    if !bench.quick {
        for (label, requests) in [("32, first 20000 requests", 625), ("32, another 180000", 5625)] {
            table.measure(label, &sides, Plan { connections: 32, over: Duration::ZERO, each: Each::Requests(requests) }, 1);
        }
    }
    table.print("Memory is to stay where it was after the first 20000 requests.");
}

struct Bench {
    quick: bool,
    folder: Folder,
    upstream: Upstream,
}

impl Bench {
    fn pick<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }

    /// A proxy with a folder of this name.
    fn proxy(&self, name: &str, settings: &[(&str, &str)]) -> Proxy {
        Proxy::start(&self.folder.room(name), &self.upstream, settings)
    }

    /// Starts one; the nanoseconds until it answered a question.
    fn first_answer(&self, name: &str) -> (u64, Proxy) {
        let began = wire::now();
        let proxy = self.proxy(name, &[]);
        let load = drive(&proxy.ask(), Plan { connections: 1, over: Duration::ZERO, each: Each::Requests(1) });
        assert_eq!(load.answers, 1, "the first question is answered");
        (wire::now() - began, proxy)
    }

    /// The question as the upstream takes it.
    fn question(&self, options: &str) -> Call {
        let body = format!(r#"{{"model":"bench","messages":[{{"role":"user","content":"{QUESTION}"}}]{options}}}"#);
        Call::post(self.upstream.address, "/v1/chat/completions", "Authorization: Bearer sk-bench\r\n", &body)
    }

    fn direct(&self) -> Side<'static> {
        let call = self.question("");
        side("direct", move |plan| Run::of(drive(&call, plan)))
    }
}

fn proxied<'a>(name: &'a str, call: Call, proxy: &'a Proxy) -> Side<'a> {
    side(name, move |plan| {
        let before = proxy.cpu();
        let load = drive(&call, plan);
        let after = proxy.cpu();
        // What it does later must not disturb the next side's run.
        proxy.settle();
        let (rss, peak) = (proxy.memory("VmRSS"), proxy.memory("VmHWM"));
        Run { load, cpu: after - before, cpu_later: proxy.cpu() - after, rss, peak }
    })
}

/// What SQLite waits for in each commit: 4 KiB of its log, which is written over again and again.
fn syncs(folder: PathBuf) -> Side<'static> {
    side("one sync of this disk", move |_| {
        let mut file = File::options().create(true).write(true).truncate(false).open(folder.join("sync")).expect("a file");
        let mut load = Measured::default();
        for _ in 0..70 {
            let began = wire::now();
            file.write_all(&[7; 4096])
                .and_then(|()| file.sync_data())
                .and_then(|()| file.rewind())
                .expect("a disk that is not full");
            load.latency.push(wire::now() - began);
        }
        load.latency.sort_unstable();
        load.seconds = f64::NAN;
        Run::of(load)
    })
}
