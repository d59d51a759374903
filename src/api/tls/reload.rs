//! What is made from files, and made again when they change.
//!
//! The files are looked at when somebody asks and the last look is [`RELOAD_CHECK_INTERVAL`]
//! ago. Files that have become unusable change nothing but the log: what was made from
//! them before stays.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::TlsError;

/// How long the files on disk are taken as unchanged after a look at them.
pub const RELOAD_CHECK_INTERVAL: Duration = Duration::from_secs(1);

type Read<C> = Box<dyn Fn() -> Result<C, TlsError> + Send + Sync>;

/// A `C` made from files.
pub(super) struct Reloading<C> {
    paths: Vec<PathBuf>,
    read: Read<C>,
    loaded: Mutex<Loaded<C>>,
}

struct Loaded<C> {
    config: Arc<C>,
    /// The files as they were when last read, whatever they held.
    stamps: Vec<Stamp>,
    checked: Instant,
}

/// What changes when a file is replaced or rewritten; `None` when it cannot be found.
type Stamp = Option<(u64, u64, i64, i64, u64)>;

impl<C: Send + Sync + 'static> Reloading<C> {
    /// Reads for the first time. Blocks on the disk.
    pub(super) fn load(paths: Vec<PathBuf>, read: Read<C>) -> Result<Reloading<C>, TlsError> {
        // Stamps before contents: a file replaced in between is read once more later.
        let stamps = stamps(&paths);
        let config = Arc::new(read()?);
        let loaded = Mutex::new(Loaded { config, stamps, checked: Instant::now() });
        Ok(Reloading { paths, read, loaded })
    }

    /// What the files say, after a look at them when one is due.
    pub(super) async fn current(self: &Arc<Self>) -> Arc<C> {
        {
            let mut loaded = self.loaded.lock();
            if loaded.checked.elapsed() < RELOAD_CHECK_INTERVAL {
                return Arc::clone(&loaded.config);
            }
            // From here on others use what there is, until this look is over.
            loaded.checked = Instant::now();
        }
        let this = Arc::clone(self);
        // Fails only when the runtime is going down; what there is will do then.
        let _ = tokio::task::spawn_blocking(move || this.reload()).await;
        Arc::clone(&self.loaded.lock().config)
    }

    /// Reads the files again if they are not those of the last time.
    fn reload(&self) {
        let stamps = stamps(&self.paths);
        if stamps == self.loaded.lock().stamps {
            return;
        }
        let cert_file = self.paths.first().map(|path| path.display());
        match (self.read)() {
            Ok(config) => {
                tracing::info!(
                    cert_file = cert_file.map(tracing::field::display),
                    "TLS files have changed: new connections use the new ones"
                );
                let mut loaded = self.loaded.lock();
                loaded.config = Arc::new(config);
                loaded.stamps = stamps;
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    "TLS files have changed but cannot be used: keeping the old ones"
                );
                // Bad content is read again when it changes; a file that cannot be read
                // may be readable the next time as it is.
                if !matches!(error, TlsError::Read { .. }) {
                    self.loaded.lock().stamps = stamps;
                }
            }
        }
    }
}

impl<C> fmt::Debug for Reloading<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloading").field("paths", &self.paths).finish_non_exhaustive()
    }
}

fn stamps(paths: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let meta = fs::metadata(path).ok()?;
        Some((meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
    };
    paths.iter().map(stamp).collect()
}
