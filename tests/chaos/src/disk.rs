//! A disk of its own for a member, which can be frozen and filled: an ext4 file system in a
//! file, mounted by a loop device. It takes root.
//!
//! A frozen file system stops every write and every fsync until it is thawed, as a disk
//! does that hangs. A full one refuses to grow.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FallocateFlags, fallocate};

/// Room on a disk, sparse until it is used: etcd alone allocates 128 MiB of log ahead.
const SIZE_BYTES: u64 = 768 * 1024 * 1024;

/// A mounted file system.
#[derive(Debug)]
pub struct Disk {
    mount: PathBuf,
}

fn run(program: &str, arguments: &[&Path]) -> io::Result<()> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program} {arguments:?}: {}", text.trim())))
}

impl Disk {
    /// Makes a file system in `image` and mounts it at `mount`.
    pub fn new(image: &Path, mount: &Path) -> io::Result<Disk> {
        File::create(image)?.set_len(SIZE_BYTES)?;
        run("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), "-m0".as_ref(), image])?;
        fs::create_dir_all(mount)?;
        run("mount", &["-o".as_ref(), "loop".as_ref(), image, mount])?;
        Ok(Disk { mount: mount.to_owned() })
    }

    /// Stops every write until [`Disk::thaw`].
    pub fn freeze(&self) -> io::Result<()> {
        run("fsfreeze", &["-f".as_ref(), &self.mount])
    }

    /// Lets writes go on.
    pub fn thaw(&self) -> io::Result<()> {
        run("fsfreeze", &["-u".as_ref(), &self.mount])
    }

    fn ballast(&self) -> PathBuf {
        self.mount.join("ballast")
    }

    /// Leaves no room.
    pub fn fill(&self) -> io::Result<()> {
        let file = File::create(self.ballast())?;
        let (mut at, mut step) = (0, SIZE_BYTES);
        while step >= 4096 {
            match fallocate(&file, FallocateFlags::empty(), at, step) {
                Ok(()) => at += step,
                Err(rustix::io::Errno::NOSPC) => step /= 2,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Gives the room back.
    pub fn empty(&self) -> io::Result<()> {
        fs::remove_file(self.ballast())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It is thawed already, unless a campaign ended in between.
        let _ = self.thaw();
        if let Err(error) = run("umount", &[&self.mount]) {
            eprintln!("{error}");
        }
    }
}
