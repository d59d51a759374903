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
#[error("{0}")]
pub struct Fatal(pub Arc<str>);

impl Fatal {
    /// A fatal error of this text.
    pub fn new(text: impl Into<String>) -> Fatal {
        Fatal(Arc::from(text.into()))
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
