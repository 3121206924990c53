//! A temporary folder that removes itself.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        loop {
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("ai-proxy-it-{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                // Left by a run that was killed, of a process of the same number, as containers have them.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                made => {
                    made.expect("a temporary folder");
                    return Folder(path);
                }
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
