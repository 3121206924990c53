//! The tests run the real program, from outside: over its port, its signals, its files and its output.

mod ask;
mod attacks;
mod bad_upstream;
mod cli;
mod crash;
mod disk;
mod errors;
mod history;
mod idempotency;
mod kills;
mod logging;
mod mock;
mod openapi;
mod rate_limit;
mod restart;
mod secrets;
mod shutdown;
mod streaming;
mod support;
mod system;
mod text;
mod tidy;
mod tls;
mod upstream;
mod v1;
