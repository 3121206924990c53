//! What the kernel and the C library know or do. First what neither std nor rustix has: the descriptor of a socket that the
//! HTTP library keeps to itself, whether a peer has taken what was sent and how much it takes, memory that is not in use, which
//! thread goes first.
//! Then what std has in another way: a wait with an end, which file stands at a path and what room is left there, how many
//! files and threads there may be, how much memory the program takes. And a C function of our own.
//! The only `unsafe` code of the program; knows no HTTP.
//!
//! Why the sockets: the library's parser has no limits, and its connection type does not let go of the
//! socket, so we read and write by a second descriptor for the same socket.

use std::cell::Cell;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, RawFd};
use std::path::Path;
use std::time::Instant;

use rustix::event::{PollFd, Timespec};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

/// Waits until something is true of one of `fds`, which then say what; false: `until` came first.
pub fn poll(fds: &mut [PollFd], until: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        match rustix::event::poll(fds, left.as_ref()) {
            Err(Errno::INTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}

/// The inode of the file at a path; `None` where there is none. Errs where the disk does not say.
pub fn inode(path: &Path) -> io::Result<Option<u64>> {
    match told_of(path, StatxFlags::INO) {
        Ok((inode, _)) => Ok(Some(inode)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The bytes of the file at a path, 0 where there is none.
pub fn size(path: &Path) -> u64 {
    told_of(path, StatxFlags::SIZE).map_or(0, |(_, size)| size)
}

/// Inode and size of a file, that of them which is asked for, and nothing else. Since Linux 6.13 a file whose times are asked
/// for, as std does, has them written anew by its next write: a change of threads and up to 60 us more for a question on one
/// connection.
fn told_of(path: &Path, what: StatxFlags) -> rustix::io::Result<(u64, u64)> {
    match rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), what) {
        // Older kernels and some sandboxes have none.
        Err(Errno::NOSYS | Errno::PERM) => rustix::fs::stat(path).map(|file| (file.st_ino, file.st_size as u64)),
        told => told.map(|file| (file.stx_ino, file.stx_size)),
    }
}

/// Bytes of the file system of a path.
#[derive(Clone, Copy)]
pub struct Room {
    /// Left for us.
    pub left: u64,
    pub total: u64,
}

/// How large the file system of a path is; `None` where that is not known.
pub fn room(path: &Path) -> Option<Room> {
    // Some file systems of a network have no numbers, and say so with zeros.
    let system = rustix::fs::statvfs(path).ok().filter(|system| system.f_blocks > 0)?;
    let bytes = |blocks: u64| blocks.saturating_mul(system.f_frsize);
    Some(Room { left: bytes(system.f_bavail), total: bytes(system.f_blocks) })
}

/// Whether a file of so many bytes finds room beside this one, where blocks are smaller than a page; true where they are not,
/// or that cannot be tried.
pub fn fits_in_blocks(path: &Path, bytes: u64) -> bool {
    // The file may be a link.
    let Ok(path) = path.canonicalize() else { return true };
    let folder = path.parent().unwrap_or(&path);
    if rustix::fs::statvfs(folder).is_ok_and(|system| system.f_frsize >= 4096) {
        return true;
    }
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    // Without a name it is gone when it is closed.
    let Ok(file) = rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) else { return true };
    !matches!(rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes), Err(Errno::NOSPC | Errno::DQUOT))
}

/// A second descriptor for the connection that was accepted last, its inode, and how many bytes its peer has room for: `lowest`
/// was the lowest free descriptor just before, `local` is the listener's address, and `known` tells which sockets (by
/// their inode) were there already. `None` where it is not found.
///
/// The kernel hands out the lowest free number, so the first look finds it, unless another thread took
/// that number or freed a lower one in between.
pub fn adopt_accepted(lowest: RawFd, local: SocketAddr, known: impl Fn(u64) -> bool) -> Option<(TcpStream, u64, usize)> {
    let (near, below) = (lowest..lowest.saturating_add(256), 0..lowest);
    near.chain(below).find_map(|number| adopt(number, local, &known))
}

fn adopt(number: RawFd, local: SocketAddr, known: &impl Fn(u64) -> bool) -> Option<(TcpStream, u64, usize)> {
    // SAFETY: the number may be free, or belong to anything in this process. It is borrowed for this
    // call alone, which fails on a free number and changes nothing on a wrong one; the result owns a
    // descriptor of its own.
    let there = unsafe { BorrowedFd::borrow_raw(number) };
    // Asked before it is copied: closing the copy of a file's descriptor would drop all locks that this
    // process holds on the file (fcntl(2)), and SQLite's are such.
    let (inode, window) = new_client(there, local, known)?;
    let copy = rustix::io::fcntl_dupfd_cloexec(there, 0).ok()?;
    match socket_inode(&copy) {
        Some(same) if same == inode => return Some((TcpStream::from(copy), inode, window)),
        // The number changed hands in between. Where it is a file's now, the copy is never closed.
        Some(_) => {}
        None => _ = copy.into_raw_fd(),
    }
    None
}

/// The inode of a client's socket that is not known yet, and how many bytes the client has room for.
fn new_client(there: BorrowedFd, local: SocketAddr, known: &impl Fn(u64) -> bool) -> Option<(u64, usize)> {
    if rustix::net::sockopt::socket_acceptconn(there) != Ok(false) {
        return None;
    }
    // Not asked for: the peer, since a client that reset the connection has none any more.
    let address: SocketAddr = rustix::net::getsockname(there).ok()?.try_into().ok()?;
    let inode = socket_inode(there).filter(|_| address.port() == local.port())?;
    // One that is about to be closed may be off the list already, but was sent an answer.
    let info = tcp_info(&there)?;
    (!known(inode) && info.tcpi_bytes_sent == 0).then_some((inode, info.tcpi_snd_wnd as usize))
}

/// Two open sockets have the same only when 2^32 others came between; the later client is dropped then. `SO_COOKIE` has no
/// such end, but sandboxes such as gVisor lack it.
fn socket_inode(socket: impl AsFd) -> Option<u64> {
    let file = rustix::fs::fstat(socket).ok()?;
    (FileType::from_raw_mode(file.st_mode) == FileType::Socket).then_some(file.st_ino)
}

/// What the kernel knows of a connection (`TCP_INFO`, tcp(7)).
fn tcp_info(stream: &impl AsFd) -> Option<libc::tcp_info> {
    // SAFETY: tcp_info is plain numbers, for which all zeros is a value; the kernel writes at most
    // `len` bytes into it.
    unsafe {
        let mut info: libc::tcp_info = std::mem::zeroed();
        // Kernels before 5.4 do not tell it.
        info.tcpi_snd_wnd = u32::MAX;
        let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
        let place = (&raw mut info).cast();
        let result = libc::getsockopt(stream.as_fd().as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut len);
        (result == 0).then_some(info)
    }
}

/// The peer has taken all that was sent on this connection (`SIOCOUTQ`, tcp(7)); false where that is not known.
pub fn is_idle(stream: &TcpStream) -> bool {
    let mut unsent: libc::c_int = 0;
    // SAFETY: the kernel writes one c_int at the given place.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut unsent) };
    result == 0 && unsent == 0
}

thread_local! {
    /// What this thread was told last.
    static MAKES_WAY: Cell<Option<bool>> = const { Cell::new(None) };
}

/// Whether this thread, when it is woken, lets who runs go on first (`SCHED_BATCH`, sched(7)). Where that cannot be had,
/// nothing changes.
pub fn make_way(makes_way: bool) {
    let policy = if makes_way { libc::SCHED_BATCH } else { libc::SCHED_OTHER };
    let priority: libc::c_int = 0;
    // To ask the kernel would be a system call for each question. A new thread has what its parent had, so it is told once.
    if MAKES_WAY.replace(Some(makes_way)) != Some(makes_way) {
        // Past the C library: musl's function does nothing.
        // SAFETY: 0 is this thread, and the kernel only reads the given place.
        unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const priority) };
    }
}

/// Gives the memory of this thread's stack below its present depth back to the system, but for a little.
/// A call of the LLM begins 24 KiB deep in ureq and then, as a stream, waits in shallow water for
/// minutes: 2,000 streams would take 101 MiB instead of 62.
// Not inlined: what lives below `here` is then the rest of this small frame, and nothing of a caller's.
#[inline(never)]
pub fn forget_unused_stack() {
    const KEEP: usize = 1024;
    let here = 0_u8;
    let depth = (&raw const here).addr();
    // SAFETY: the attributes are filled in by the first call and destroyed after the second. What is given
    // back is this thread's own stack, from its lowest address to some way below the deepest frame, where
    // nothing lives; if it is used again the kernel gives zeroed pages.
    unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        if libc::pthread_getattr_np(libc::pthread_self(), &raw mut attributes) != 0 {
            return;
        }
        let (mut lowest, mut size) = (std::ptr::null_mut(), 0);
        if libc::pthread_attr_getstack(&raw const attributes, &raw mut lowest, &raw mut size) == 0 {
            // The kernel rounds up to whole pages, which are of 16 or 64 KiB on some ARM systems.
            let unused = depth.saturating_sub(KEEP + lowest.addr()) & !(rustix::param::page_size() - 1);
            if unused > 0 && unused < size {
                libc::madvise(lowest, unused, libc::MADV_DONTNEED);
            }
        }
        libc::pthread_attr_destroy(&raw mut attributes);
    }
}

/// Has the system give this thread the part of its stack that a call of the LLM begins with, page by page. A thread that is
/// started ahead has the time for it: 10 us less to the first byte.
#[inline(never)]
pub fn touch_stack() {
    std::hint::black_box(&mut [0_u8; 24 * 1024]);
}

/// From now on what is large gives its memory back to the system as soon as it is freed. glibc raises its own bound, of
/// 128 KiB, up to 32 MiB with each such piece, and keeps what lies below.
pub fn give_back_what_is_large() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) asks nothing of its caller.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 * 1024);
    }
}

/// Gives the free memory of the heap back to the system: what a busy hour took, glibc keeps for the next.
pub fn forget_unused_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) asks nothing of its caller.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// How many threads there may be: each takes four mappings of memory, and one that finds none left when it begins ends the
/// process, since std then panics where nothing catches it. The rest is the program's own.
pub fn most_threads() -> usize {
    const OTHERS: usize = 5000;
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|text| text.trim().parse::<usize>().ok());
    most.map_or(usize::MAX, |most| most.saturating_sub(OTHERS) / 4)
}

/// A connection takes three descriptors and a call one, so the soft limit goes up to the hard one.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    }
}

/// Bytes of resident memory (proc(5), statm: pages).
pub fn resident_memory() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// The natural logarithm, in place of the C library's: a ranking of SQLite's that no search here asks for is all that
/// needs its libm, which would take 0.4 MiB of the idle server's memory.
// SAFETY: it is what C's `log` is, by type and meaning.
#[unsafe(no_mangle)]
extern "C" fn log(x: f64) -> f64 {
    libm::log(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
    use std::io::{Read, Write};
    use std::net::TcpListener;

    #[test]
    fn the_logarithm_is_one() {
        use std::f64::consts::{E, LN_2, LN_10};
        for (x, y) in [(1.0, 0.0), (E, 1.0), (2.0, LN_2), (10.0, LN_10), (0.5, -LN_2), (0.0, f64::NEG_INFINITY)] {
            assert!(log(x) == y || (log(x) - y).abs() < 1e-15, "{x}");
        }
        assert!(log(-1.0).is_nan());
    }

    #[test]
    fn who_has_not_taken_what_was_sent_is_not_idle() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (mut server, _) = listener.accept().expect("accepted");
        assert!(is_idle(&server));
        server.set_nonblocking(true).expect("nonblocking");
        let mut sent = 0;
        while let Ok(written) = server.write(&[0; 4096]) {
            sent += written;
        }
        assert!(!is_idle(&server));
        client.read_exact(&mut vec![0; sent]).expect("read");
        while !is_idle(&server) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_not_one_that_cannot_be_looked_at() {
        let program = std::env::current_exe().expect("a path");
        assert!(matches!(inode(&program), Ok(Some(_))));
        assert!(matches!(inode(&program.with_file_name("absent")), Ok(None)));
        assert!(matches!(inode(&program.join("within a file")), Ok(None)));
        assert!(inode(&program.with_file_name("x".repeat(300))).is_err());
    }

    #[test]
    fn who_makes_way_does_so_until_it_is_told_not_to() {
        // The 41st field (proc_pid_stat(5)), the 39th behind the name.
        let policy = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("stat");
            let (_, fields) = stat.rsplit_once(')').expect("a name");
            fields.split_whitespace().nth(38).and_then(|policy| policy.parse().ok())
        };
        make_way(true);
        assert_eq!(policy(), Some(libc::SCHED_BATCH));
        make_way(false);
        assert_eq!(policy(), Some(libc::SCHED_OTHER));
    }

    #[test]
    fn a_stack_goes_on_after_its_unused_part_is_forgotten() {
        fn deep(levels: u64) -> u64 {
            let filled = std::hint::black_box([levels; 128]);
            if levels == 0 { 0 } else { filled[7] + deep(levels - 1) }
        }
        let kept = std::hint::black_box([7_u64; 64]);
        let before = deep(100);
        forget_unused_stack();
        assert_eq!((deep(100), kept), (before, [7; 64]));
    }

    #[test]
    fn the_accepted_socket_is_found_among_others() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let local = listener.local_addr().expect("bound");
        let lowest = rustix::io::fcntl_dupfd_cloexec(&listener, 0).expect("a descriptor").as_raw_fd();
        let _first = TcpStream::connect(local).expect("connected");
        let (one, _) = listener.accept().expect("accepted");
        let inode = socket_inode(&one);
        let second = TcpStream::connect(local).expect("connected");
        let (_two, _) = listener.accept().expect("accepted");
        let (found, _, _) = adopt_accepted(lowest.min(one.as_raw_fd()), local, |known| Some(known) == inode).expect("found");
        assert_eq!(found.peer_addr().ok(), second.local_addr().ok());
        (&one).write_all(b"answer").expect("sent");
        let (found, _, _) = adopt_accepted(lowest.min(one.as_raw_fd()), local, |_| false).expect("found");
        assert_eq!(found.peer_addr().ok(), second.local_addr().ok(), "not one that was answered");
    }

    #[test]
    fn a_peer_says_how_much_it_has_room_for() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let local = listener.local_addr().expect("bound");
        for (buffer, windows) in [(2048, 1..8192), (1 << 20, 8192..1 << 30)] {
            let client = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a socket");
            sockopt::set_socket_recv_buffer_size(&client, buffer).expect("a buffer");
            rustix::net::connect(&client, &local).expect("connected");
            let (server, _) = listener.accept().expect("accepted");
            let (_, window) = new_client(server.as_fd(), local, &|_| false).expect("a new client");
            assert!(windows.contains(&window), "{window} of {buffer}");
        }
    }
}
