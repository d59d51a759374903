//! How a server ends: told to, dropped, or because something failed for good.
//!
//! ```text
//! signal ──▶ listeners and streams end ──▶ raft ──▶ log (synced), apply ──▶ checkpoint
//! ```
//!
//! Each waits for what is before it, so that nothing is dropped that somebody in front
//! still hands on. A thread that panics is a fatal error like any other.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle as ThreadHandle;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::StartError;
use crate::error::Error;
use crate::runtime::checkpoint_thread::CheckpointTask;
use crate::runtime::fault::Fault;
use crate::runtime::raft_thread::RaftInput;
use crate::runtime::waiters::Waiters;
use crate::runtime::watch_hub::HubHandle;

/// How everything is told to stop.
pub(super) struct Stop {
    pub(super) signal: watch::Sender<bool>,
    pub(super) hub: HubHandle,
    pub(super) tasks: Vec<JoinHandle<()>>,
    pub(super) threads: Option<Threads>,
}

impl Stop {
    /// Completes once the stop has begun.
    pub(super) fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stopped = self.signal.subscribe();
        async move {
            // A sender that is gone has stopped, too.
            let _ = stopped.wait_for(|stopped| *stopped).await;
        }
    }

    /// No new work; streams end.
    pub(super) fn begin(&self) {
        self.signal.send_replace(true);
        self.hub.close();
    }

    /// Stops everything and waits for it.
    pub(super) async fn finish(mut self) {
        self.begin();
        if let Some(threads) = self.take_threads() {
            // Joining threads blocks; that they panicked is no reason to panic here.
            let _ = tokio::task::spawn_blocking(move || threads.join()).await;
        }
    }

    /// The threads, to be told and joined; `None` the second time.
    fn take_threads(&mut self) -> Option<Threads> {
        for task in self.tasks.drain(..) {
            task.abort();
        }
        self.threads.take()
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.begin();
        if let Some(threads) = self.take_threads() {
            threads.tell();
        }
    }
}

/// The threads, and how they are told to stop.
pub(super) struct Threads {
    pub(super) raft: mpsc::Sender<RaftInput>,
    pub(super) checkpoint: mpsc::Sender<CheckpointTask>,
    pub(super) waiters: Arc<Waiters>,
    /// Raft, log and apply: the first tells the others.
    pub(super) front: Vec<ThreadHandle<()>>,
    pub(super) checkpointer: Option<ThreadHandle<()>>,
}

impl Threads {
    /// Begins the end. A thread that is gone already needs no telling.
    fn tell(&self) {
        let _ = self.raft.send(RaftInput::Stop);
        let _ = self.checkpoint.send(CheckpointTask::Stop);
    }

    /// Stops the threads and waits for them. What they acknowledged is on disk then.
    /// Blocks.
    fn join(self) {
        let _ = self.raft.send(RaftInput::Stop);
        for thread in self.front {
            // One that panicked has ended, too.
            let _ = thread.join();
        }
        self.waiters.fail_all(&Error::Stopped);
        let _ = self.checkpoint.send(CheckpointTask::Stop);
        if let Some(checkpointer) = self.checkpointer {
            let _ = checkpointer.join();
        }
    }
}

/// After a fatal error: nobody is left waiting, and nothing new is taken.
pub(super) async fn end_on_fault(
    fault: Fault,
    waiters: Arc<Waiters>,
    hub: HubHandle,
    raft: mpsc::Sender<RaftInput>,
    stop: watch::Sender<bool>,
) {
    let mut stopped = stop.subscribe();
    tokio::select! {
        _ = fault.wait() => {
            hub.close();
            // It ends the threads that have not, and has all questions refused.
            let _ = raft.send(RaftInput::Stop);
            waiters.fail_all(&Error::Stopped);
            stop.send_replace(true);
        }
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
}

/// Starts a thread. Should it panic, the server stops as after any other fatal error.
pub(super) fn spawn(
    name: &'static str,
    fault: &Fault,
    run: impl FnOnce() + Send + 'static,
) -> Result<ThreadHandle<()>, StartError> {
    let guard = PanicGuard { thread: name, fault: fault.clone() };
    let run = move || {
        let _guard = guard;
        run();
    };
    std::thread::Builder::new()
        .name(format!("kvorum-{name}"))
        .spawn(run)
        .map_err(StartError::Thread)
}

struct PanicGuard {
    thread: &'static str,
    fault: Fault,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fault.raise(self.thread, "its thread panicked; please report the panic's message");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::super::member::Member;
    use super::*;
    use crate::config::Config;
    use crate::pb::etcdserverpb::RangeRequest;

    /// Far more than a shutdown takes; a limit for one that hangs.
    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_thread_that_panics_is_a_fatal_error_and_one_that_ends_is_not() {
        let fault = Fault::default();
        spawn("calm", &fault, || {}).unwrap().join().unwrap();
        assert!(fault.get().is_none());
        spawn("test", &fault, || panic!("on purpose")).unwrap().join().unwrap_err();
        let fatal = fault.get().unwrap().to_string();
        assert!(fatal.starts_with("test: ") && fatal.contains("panicked"), "{fatal}");
    }

    #[test]
    fn a_panic_of_the_raft_thread_is_reported_and_does_not_keep_a_server_from_stopping() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (fatal, answer, finished) = runtime.block_on(async {
            let config = Config::in_memory();
            let member =
                Member::start(&config, crate::api::connector::connector(None)).await.unwrap();
            member.ready(&config, Vec::new()).await.unwrap();
            // Nobody has committed that much, so the raft crate panics.
            let too_far = RaftInput::Applied(u64::MAX);
            member.stop.threads.as_ref().unwrap().raft.send(too_far).unwrap();
            let fatal = timeout(PATIENCE, member.fault.wait()).await;
            let answer =
                member.engine.range(RangeRequest { key: "key".into(), ..Default::default() });
            let answer = timeout(PATIENCE, answer).await;
            (fatal, answer, timeout(PATIENCE, member.stop.finish()).await)
        });
        // Were it dropped, it would wait for the threads that hang.
        runtime.shutdown_background();
        let fatal = fatal.unwrap().to_string();
        assert!(fatal.starts_with("raft: ") && fatal.contains("panicked"), "{fatal}");
        assert_eq!(answer.unwrap().unwrap_err(), Error::Stopped, "nobody leads any more");
        assert!(finished.is_ok(), "a thread did not end");
    }
}
