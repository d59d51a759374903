//! What makes an etcd leave a log of kvorum alone that is started on it by mistake.
//!
//! ```text
//! etcd finds no *.wal in its log's directory  ─▶ a new member: removes the directory, makes its own
//! etcd finds one                              ─▶ reads those that are named like its own: there
//!                                                are none, "wal: file not found", and it ends
//! ```
//!
//! So a file lies there that ends in `.wal`, is named like none of etcd's, and says to whoever looks
//! what this directory is. That holds for etcd 3.5, 3.6 and 3.7; before it looks at its log etcd makes
//! an empty `member/snap/db`, if there is none, which stays behind.
//!
//! It is no part of the log: nobody reads it, and where it cannot be written the log is as good as
//! before.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// The file. Its name's end is what etcd looks for.
pub(super) const GUARD: &str = "kvorum.wal";
/// What is in it.
const TEXT: &str = "This directory holds the raft log of a member of kvorum, or is kept free for it.\n\
     It is none of etcd's: an etcd that is started here refuses because of this file.\n\
     Without it etcd would delete the directory, and with it what was acknowledged.\n";

/// Puts the guard into a directory, which is made if need be. If it cannot be written, that is warned
/// of.
pub(super) fn put(dir: &Path) {
    if let Err(error) = try_to_put(dir) {
        let dir = dir.display();
        tracing::warn!(%error, %dir, "cannot write {GUARD}, because of which etcd would spare this directory");
    }
}

/// Whether it is there.
pub(super) fn is_in(dir: &Path) -> bool {
    dir.join(GUARD).exists()
}

fn try_to_put(dir: &Path) -> io::Result<()> {
    let path = dir.join(GUARD);
    // One that a full disk has cut short guards as well, but says less.
    if fs::read(&path).is_ok_and(|text| text == TEXT.as_bytes()) {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let mut options = File::options();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
    io::Write::write_all(&mut file, TEXT.as_bytes())
}
