//! The tests run the real program, from outside: over its port, its signals, its files and its output.

mod ask;
mod cli;
mod crash;
mod errors;
mod history;
mod idempotency;
mod logging;
mod mock;
mod rate_limit;
mod restart;
mod shutdown;
mod streaming;
mod support;
mod system;
mod text;
mod tidy;
mod upstream;
mod v1;
