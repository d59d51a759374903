//! File systems of a test's own: small ones that fill up, and images that can be copied
//! as a power cut would leave them. Needs root and loop devices; where these are not to
//! be had, [`unavailable`] says so and the tests are skipped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::node::{PATIENCE, POLL};

/// Images go to memory when it has more free space than this.
const ROOMY_BYTES: u64 = 4 << 30;
/// Names begin so; the process id follows, so that what a killed test left is known.
const MARK: &str = "kvorum-crash-disk-";

/// A mounted file system. Unmounted and removed when dropped.
pub(crate) struct Disk {
    /// Holds the image, if there is one, and the directory it is mounted on.
    directory: tempfile::TempDir,
    mounted: bool,
}

impl Disk {
    /// An ext4 image of this size, mounted.
    pub(crate) fn ext4(size_bytes: u64) -> Disk {
        let disk = Disk::directory();
        let image = File::create(disk.image()).expect("an image");
        image.set_len(size_bytes).expect("an image");
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0", "-E", "nodiscard"]).arg(disk.image()));
        disk.mount_image()
    }

    /// A file system in memory with room for this much, mounted.
    pub(crate) fn tmpfs(size_bytes: u64) -> Disk {
        let mut disk = Disk::directory();
        let size = format!("size={size_bytes}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(disk.path()));
        disk.mounted = true;
        disk
    }

    /// What the block device holds at this moment, mounted elsewhere: the state after a
    /// power cut. Whoever writes to this disk must stand still.
    pub(crate) fn after_a_power_cut(&self) -> Disk {
        let copy = Disk::directory();
        for attempt in 0.. {
            let before = self.writes();
            run(Command::new("cp").arg("--sparse=always").arg(self.image()).arg(copy.image()));
            // The kernel may have written something back meanwhile, and a copy of that
            // could show writes in an order that no disk does.
            if before.is_some() && self.writes() == before {
                break;
            }
            assert!(attempt < 50, "the disk never rests");
        }
        copy.mount_image()
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    fn directory() -> Disk {
        let prefix = format!("{MARK}{}-", std::process::id());
        // Memory, if there is enough: a loop device on it is faster, and as forgetful.
        let space = rustix::fs::statvfs("/dev/shm");
        let roomy = space.is_ok_and(|space| space.f_bavail * space.f_frsize > ROOMY_BYTES);
        let place = if roomy { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir_in(place);
        let directory = directory.expect("a directory");
        let disk = Disk { directory, mounted: false };
        fs::create_dir(disk.path()).expect("a directory");
        disk
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    fn mount_image(mut self) -> Disk {
        run(Command::new("mount").args(["-o", "loop"]).arg(self.image()).arg(self.path()));
        self.mounted = true;
        self
    }

    /// How many writes the block device has completed; `None` while one is under way.
    fn writes(&self) -> Option<String> {
        let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
        let path = self.path();
        let line = mounts.lines().find(|line| line.split(' ').nth(1) == path.to_str());
        let device = line?.split(' ').next()?.trim_start_matches("/dev/");
        let stat = fs::read_to_string(format!("/sys/block/{device}/stat")).expect("statistics");
        let fields: Vec<&str> = stat.split_whitespace().collect();
        // Documentation/block/stat.rst: completed writes, and requests in flight.
        (fields.get(8) == Some(&"0")).then(|| fields[4].to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            unmount(&self.path());
        }
    }
}

/// Why tests with disks of their own cannot run here; `None` if they can.
pub(crate) fn unavailable() -> Option<&'static str> {
    static PROBED: OnceLock<Option<String>> = OnceLock::new();
    let probed = PROBED.get_or_init(|| {
        clean_up_after_others();
        if !rustix::process::geteuid().is_root() {
            return Some("only root can mount".to_owned());
        }
        // Whatever is missing (a kernel module, a device node, a capability) shows here.
        std::panic::catch_unwind(|| drop((Disk::ext4(32 << 20), Disk::tmpfs(1 << 20)))).err().map(
            |panic| match panic.downcast_ref::<String>() {
                Some(message) => message.clone(),
                None => "mounting does not work".to_owned(),
            },
        )
    });
    probed.as_deref()
}

/// Unmounts what tests that were killed have left mounted.
fn clean_up_after_others() {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    for path in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        let owner = path.split_once(MARK).and_then(|(_, rest)| rest.split('-').next());
        let Some(owner) = owner.and_then(|owner| owner.parse::<u32>().ok()) else { continue };
        if !Path::new(&format!("/proc/{owner}")).exists() {
            unmount(Path::new(path));
            if let Some(directory) = Path::new(path).parent() {
                let _ = fs::remove_dir_all(directory);
            }
        }
    }
}

/// A process that was killed may hold it for a moment yet.
fn unmount(path: &Path) {
    let began = std::time::Instant::now();
    loop {
        let unmounted = Command::new("umount").arg(path).output();
        if unmounted.is_ok_and(|unmounted| unmounted.status.success()) {
            return;
        }
        if began.elapsed() > PATIENCE {
            let _ = Command::new("umount").arg("--lazy").arg(path).status();
            return;
        }
        std::thread::sleep(POLL);
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}", said.trim());
}
