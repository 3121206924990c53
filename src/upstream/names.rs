//! The upstream's name and its addresses. Knows threads, and nothing of what is connected to.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::watch::Watch;
use crate::lock::lock;

/// A look-up is shared by who comes within this time; later its answer may be lost, and another is begun.
const SHARED: Duration = Duration::from_secs(2);

/// Look-ups of the upstream's name; who asks while one is under way waits for that one's result. The system's resolver
/// can only be waited for, so a thread of its own does that; where it hangs, one thread hangs for each two seconds.
#[derive(Clone, Debug, Default)]
pub struct Names(Arc<Mutex<Weak<Lookup>>>);

#[derive(Debug)]
struct Lookup {
    /// Ends with the look-up.
    over: UnixStream,
    /// Or why it has none.
    found: OnceLock<Result<Vec<SocketAddr>, String>>,
    since: Instant,
}

impl Names {
    /// The addresses of a host; the wait for them is the call's. Errs where there are none.
    pub fn addresses(&self, host: String, port: u16, watch: &Watch) -> io::Result<Vec<SocketAddr>> {
        if let Ok(ip) = host.parse() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        let lookup = self.look_up(host, port)?;
        watch.wait(lookup.over.as_fd(), PollFlags::IN)?;
        let why = match lookup.found.get() {
            Some(Ok(found)) if !found.is_empty() => return Ok(found.clone()),
            Some(Err(why)) => why,
            _ => "it has no address",
        };
        Err(io::Error::other(format!("its host name cannot be resolved: {why}; check OPENAI_BASE_URL and the name server")))
    }

    /// The look-up under way, or a new one.
    fn look_up(&self, host: String, port: u16) -> io::Result<Arc<Lookup>> {
        let mut running = lock(&self.0);
        if let Some(lookup) = running.upgrade().filter(|lookup| lookup.found.get().is_none() && lookup.since.elapsed() < SHARED) {
            return Ok(lookup);
        }
        let (over, ours) = UnixStream::pair()?;
        let lookup = Arc::new(Lookup { over, found: OnceLock::new(), since: Instant::now() });
        let looking = Arc::clone(&lookup);
        std::thread::Builder::new().name("resolve".into()).spawn(move || {
            // Goes last, which says that the look-up is over.
            let _ours = ours;
            let found = (host.as_str(), port).to_socket_addrs().map(Vec::from_iter);
            looking.found.get_or_init(|| found.map_err(|e| e.to_string()));
        })?;
        *running = Arc::downgrade(&lookup);
        Ok(lookup)
    }
}
