//! The first thing that stops this member for good.
//!
//! A failed fsync, a log that cannot be written, a state that contradicts itself:
//! after these nothing may be acknowledged any more. Whoever meets one reports it
//! here; the server sees it, answers everybody who waits, and stops. The process
//! goes on: it may be somebody's program that embeds kvorum.

use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

/// Why the member cannot go on. The text names what failed and where.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Fatal {
    text: Arc<str>,
    is_removal: bool,
}

/// What a member says that was removed from its cluster.
const REMOVED: &str = "the member has been permanently removed from the cluster, and its data \
    directory is of no more use: for a member at this place, remove the directory, run \
    `etcdctl member add`, and start it with --initial-cluster-state=existing";

impl Fatal {
    /// A fatal error of this text.
    pub fn new(text: impl Into<String>) -> Fatal {
        Fatal { text: Arc::from(text.into()), is_removal: false }
    }

    /// Whether nothing failed: the member was removed from its cluster.
    pub fn is_removal(&self) -> bool {
        self.is_removal
    }
}

/// Where the first fatal error is kept. Clones share it.
#[derive(Debug, Clone)]
pub struct Fault {
    first: Arc<OnceLock<Fatal>>,
    raised: watch::Sender<bool>,
}

impl Default for Fault {
    fn default() -> Fault {
        Fault { first: Arc::default(), raised: watch::Sender::new(false) }
    }
}

impl Fault {
    /// Reports that `who` cannot go on. Only the first report counts.
    pub fn raise(&self, who: &str, error: impl std::fmt::Display) {
        let fatal = Fatal::new(format!("{who}: {error}"));
        if self.first.set(fatal).is_ok() {
            tracing::error!(error = %error, "{who} failed; this member stops");
            self.raised.send_replace(true);
        }
    }

    /// Reports that this member was removed from its cluster: its end, and nobody's fault.
    pub fn raise_removal(&self) {
        let fatal = Fatal { text: Arc::from(REMOVED), is_removal: true };
        if self.first.set(fatal).is_ok() {
            tracing::warn!("{REMOVED}");
            self.raised.send_replace(true);
        }
    }

    /// What was reported, if anything.
    pub fn get(&self) -> Option<Fatal> {
        self.first.get().cloned()
    }

    /// Waits for the first report. Dropping the future has no effect.
    pub async fn wait(&self) -> Fatal {
        let mut raised = self.raised.subscribe();
        loop {
            if let Some(fatal) = self.get() {
                return fatal;
            }
            // The sender lives as long as `self`; an error cannot be.
            if raised.changed().await.is_err() {
                return Fatal::new("stopped");
            }
        }
    }
}
