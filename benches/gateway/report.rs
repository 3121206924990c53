//! Figures and tables: several sides are measured in turns, and each is compared with the first one.

use crate::load::{Measured, Plan, quantile};

/// What is measured beside something else.
pub struct Side<'a> {
    name: &'a str,
    run: Box<dyn Fn(Plan) -> Run + 'a>,
}

pub fn side<'a>(name: &'a str, run: impl Fn(Plan) -> Run + 'a) -> Side<'a> {
    Side { name, run: Box::new(run) }
}

/// What one run showed: CPU seconds and memory in MiB are the proxy's.
pub struct Run {
    pub load: Measured,
    pub cpu: f64,
    /// For what it put off until it was quiet.
    pub cpu_later: f64,
    pub rss: f64,
    pub peak: f64,
}

impl Run {
    /// A run of which only the load is known.
    pub fn of(load: Measured) -> Run {
        Run { load, cpu: f64::NAN, cpu_later: f64::NAN, rss: f64::NAN, peak: f64::NAN }
    }
}

/// A column: its title, its decimals, and how the runs of a side become its figure.
pub type Column = (&'static str, usize, Figure);

/// A figure of each run; the column shows the median over the rounds.
#[derive(Clone, Copy)]
pub enum Figure {
    Own(fn(&Run) -> f64),
    /// Compared with the first side's run of the same round.
    Ratio(fn(&Run) -> f64),
    Added(fn(&Run) -> f64),
    /// Not the median, but all of them.
    Sum(fn(&Run) -> f64),
}
use Figure::{Added, Own, Ratio, Sum};

impl Figure {
    fn over(self, runs: &[Run], base: &[Run]) -> f64 {
        let pairs = runs.iter().zip(base);
        match self {
            Own(of) => median(runs.iter().map(of).collect()),
            Ratio(of) => median(pairs.map(|(own, base)| of(own) / of(base)).collect()),
            Added(of) => median(pairs.map(|(own, base)| of(own) - of(base)).collect()),
            Sum(of) => runs.iter().map(of).sum(),
        }
    }
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

const RATE: fn(&Run) -> f64 = |run| run.load.latency.len() as f64 / run.load.seconds;
const P50: fn(&Run) -> f64 = |run| quantile(&run.load.latency, 0.5);
const P99: fn(&Run) -> f64 = |run| quantile(&run.load.latency, 0.99);
const CHUNK_P50: fn(&Run) -> f64 = |run| quantile(&run.load.chunk_delay, 0.5);
const CHUNK_P99: fn(&Run) -> f64 = |run| quantile(&run.load.chunk_delay, 0.99);
const FIRST_P50: fn(&Run) -> f64 = |run| quantile(&run.load.first_byte, 0.5);
const FAILED: Column = ("failed", 0, Sum(|run| run.load.failed as f64));

pub const ASKS: &[Column] = &[
    ("requests/s", 0, Own(RATE)),
    ("x direct", 3, Ratio(RATE)),
    ("p50 us", 0, Own(P50)),
    ("added", 0, Added(P50)),
    ("p99 us", 0, Own(P99)),
    ("added", 0, Added(P99)),
    ("CPU us", 1, Own(|run| run.cpu * 1e6 / run.load.answers as f64)),
    ("later", 1, Own(|run| run.cpu_later * 1e6 / run.load.answers as f64)),
    ("MiB", 1, Own(|run| run.rss)),
    FAILED,
];

pub const STREAMS: &[Column] = &[
    ("first byte p50 us", 0, Own(FIRST_P50)),
    ("added", 0, Added(FIRST_P50)),
    ("p99 us", 0, Own(|run| quantile(&run.load.first_byte, 0.99))),
    ("chunk delay p50 us", 0, Own(CHUNK_P50)),
    ("added", 0, Added(CHUNK_P50)),
    ("p99 us", 0, Own(CHUNK_P99)),
    ("added", 0, Added(CHUNK_P99)),
    ("CPU s/10000 chunks", 2, Own(|run| run.cpu * 10_000.0 / run.load.chunk_delay.len() as f64)),
    ("peak MiB", 1, Own(|run| run.peak)),
    FAILED,
];

pub const GROWTH: &[Column] =
    &[("p50 us", 0, Own(P50)), ("ratio", 2, Ratio(P50)), ("p99 us", 0, Own(P99)), ("ratio", 2, Ratio(P99)), FAILED];

/// A table in Markdown: what was done, by whom, and the figures.
pub struct Table {
    title: String,
    columns: &'static [Column],
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(title: &str, label: &str, columns: &'static [Column]) -> Table {
        let titles = [label, ""].into_iter().chain(columns.iter().map(|(title, ..)| *title));
        Table { title: title.into(), columns, rows: vec![titles.map(str::to_string).collect()] }
    }

    /// Runs the plan on one side after the other, so many times, and adds a line for each side.
    pub fn measure(&mut self, label: impl ToString, sides: &[Side], plan: Plan, rounds: usize) {
        let mut all: Vec<Vec<Run>> = sides.iter().map(|_| Vec::new()).collect();
        for _ in 0..rounds {
            for (runs, side) in all.iter_mut().zip(sides) {
                runs.push((side.run)(plan));
            }
        }
        for (side, runs) in sides.iter().zip(&all) {
            let figures = self.columns.iter().map(|(_, decimals, figure)| match figure.over(runs, &all[0]) {
                figure if figure.is_finite() => format!("{figure:.decimals$}"),
                _ => "-".into(),
            });
            self.rows.push([label.to_string(), side.name.to_string()].into_iter().chain(figures).collect());
        }
    }

    pub fn print(&self, note: &str) {
        println!("\n## {}\n", self.title);
        let width = |column: usize| self.rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.rows[0].len()).map(width).collect();
        for (line, row) in self.rows.iter().enumerate() {
            let cells = row.iter().zip(&widths).enumerate();
            let cells = cells.map(|(i, (cell, &width))| if i < 2 { format!("{cell:width$}") } else { format!("{cell:>width$}") });
            println!("| {} |", cells.collect::<Vec<String>>().join(" | "));
            if line == 0 {
                let rules = widths.iter().enumerate();
                let rules = rules.map(|(i, width)| "-".repeat(width + 1) + if i < 2 { "-" } else { ":" });
                println!("|{}|", rules.collect::<Vec<String>>().join("|"));
            }
        }
        if !note.is_empty() {
            println!("\n{note}");
        }
    }
}
