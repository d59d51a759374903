//! A member put together: what was recovered, the threads and tasks that work on it, the
//! queues between them, and the handle on all of it.
//!
//! Threads are spawned from the back to the front, so that each finds those it hands work
//! to. A member has no sockets; those are the server's.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use super::face::PeerFace;
use super::stop::{Stop, Threads, end_on_fault, spawn};
use super::{StartError, discover, heal};
use crate::config::{AutoCompaction, ClusterState, Config, Gate, MetricsLevel};
use crate::engine::{Engine, Limits, Parts, SAVES_MAX, Versions};
use crate::error::Error;
use crate::log::{Identity, Mark};
use crate::metrics::Metrics;
use crate::net::snapshot::Incoming;
use crate::net::{Connector, Events, PeerEvent, Peers};
use crate::pb::etcdserverpb::ResponseHeader;
use crate::raft::{Node, Start};
use crate::runtime::apply_thread::{ApplyThread, CompactionPace};
use crate::runtime::auto_compact::{AutoCompactor, Retention};
use crate::runtime::checkpoint_thread::{CheckpointThread, Checkpointer, Removed};
use crate::runtime::fault::{Fatal, Fault};
use crate::runtime::force;
use crate::runtime::forwarder::{self, PeerForwarder};
use crate::runtime::gauges::Gauges;
use crate::runtime::hashes::{self, CompactionHashes};
use crate::runtime::history::StateHistory;
use crate::runtime::image::{Images, RESUME_MAX};
use crate::runtime::leases::{LeaseClock, LeaseDuty};
use crate::runtime::log_thread::LogThread;
use crate::runtime::outbox::PeerOutbox;
use crate::runtime::pins::Pins;
use crate::runtime::proposer::Proposer;
use crate::runtime::published::Published;
use crate::runtime::raft_thread::{RaftInput, RaftParts, RaftThread};
use crate::runtime::recover::{self, Bootstrap, OpenError, Place, Recovery};
use crate::runtime::rolling_hashes::{At, RollingHashes};
use crate::runtime::roster::Roster;
use crate::runtime::space::{self, Shortage, Space};
use crate::runtime::timing::SyncTimes;
use crate::runtime::waiters::Waiters;
use crate::runtime::watch_hub::{WatchConfig, WatchHub};
use crate::version::{ETCD_STORAGE_VERSION, ETCD_VERSION};

/// A member that could not tell the cluster who it is tries again after this.
const PUBLISH_PAUSE: Duration = Duration::from_millis(100);
/// A member that waits for a leader says so as often as this.
const LEADER_WAIT_TOLD: Duration = Duration::from_secs(10);

/// A member without its sockets.
pub(super) struct Member {
    pub(super) engine: Engine,
    /// What peers call.
    pub(super) face: Arc<PeerFace>,
    published: Arc<Published>,
    /// What was known to be committed before the start.
    recovered_commit: u64,
    pub(super) fault: Fault,
    pub(super) stop: Stop,
}

impl Member {
    /// Recovers or makes the member, and starts its threads and tasks. It talks to its peers
    /// from then on; they reach it once `face` is served.
    pub(super) async fn start(config: &Config, connector: Connector) -> Result<Member, StartError> {
        let metrics = match config.metrics {
            MetricsLevel::Extensive => Metrics::extensive()?,
            MetricsLevel::Basic => Metrics::new()?,
        };
        let limits = limits(config);
        let place = place(config);
        let recovery = recover(config, place.clone(), &limits, &connector).await?;
        let Recovery { state, start, log, storage, generations, identity, .. } = recovery;
        let applied = state.applied();
        // When the last snapshot was made is not known, but the log was cut behind it: were
        // the next one counted from here, a member that is often restarted would make none.
        let catch_up = config.snapshot_catchup();
        let snapshot_index = applied.index.min(start.start.index.saturating_add(catch_up));
        let snapshots = places_to_truncate(&start, applied, catch_up);
        let recovered_index = start.entries.last().map_or(start.start.index, |entry| entry.index);
        let recovered_commit = start.hard_state.commit;
        let first_index = i64::try_from(start.start.index + 1).unwrap_or(i64::MAX);
        metrics.kvorum_raft_log_first_index.set(first_index);
        tell_settings(&metrics, config, &limits);
        let node = Node::new(start).map_err(|error| Fatal::new(error.to_string()))?;
        metrics.identify(ETCD_VERSION, state.cluster_version(), identity.member_id);

        let fault = Fault::default();
        let shortage = Arc::new(Shortage::default());
        let durable_revision = state.store().revision();
        let recovered_hash = At { index: applied.index, hash: state.rolling_hash() };
        let rolling_hashes = Arc::new(RollingHashes::new(recovered_hash));
        let state = Arc::new(RwLock::new(state));
        let published = Arc::new(Published::new(applied.index, applied.term));
        published.set_size(state.read().store().size_in_use_bytes());
        published.set_members(&state.read());
        published.set_checkpoint_bytes(storage.size_on_disk().map_err(OpenError::from)?);
        let waiters = Arc::new(Waiters::new(identity.member_id, getrandom::u64()?));
        let leases = Arc::new(LeaseClock::new(Arc::clone(&published)));
        let pins = Arc::new(Pins::default());
        let (raft_sender, raft_mailbox) = mpsc::channel();
        let (log_sender, log_tasks) = mpsc::channel();
        let (apply_sender, apply_tasks) = mpsc::channel();
        let (checkpoint_sender, checkpoint_tasks) = mpsc::channel();
        let peers = {
            let (raft, waiters, fault) = (raft_sender.clone(), Arc::clone(&waiters), fault.clone());
            let events = peer_events(raft, waiters, fault, place.member_dir());
            let Identity { cluster_id, member_id } = identity;
            Peers::new(cluster_id, member_id, connector, events, Arc::clone(&metrics))
        };
        let roster = Roster {
            state: Arc::clone(&state),
            published: Arc::clone(&published),
            peers: peers.clone(),
            fault: fault.clone(),
        };
        roster.connect();
        let signal = watch::Sender::new(false);
        let busy = Arc::new(AtomicBool::new(false));

        let header_source = {
            let published = Arc::clone(&published);
            Arc::new(move |revision| ResponseHeader {
                cluster_id: identity.cluster_id,
                member_id: identity.member_id,
                revision,
                raft_term: published.applied_term(),
            })
        };
        let watch_config = WatchConfig {
            progress_interval: config.watch_progress_interval(),
            max_request_bytes: limits.max_request_bytes,
            seed: getrandom::u64()?,
        };
        let history = StateHistory(Arc::clone(&state));
        let (hub, hub_handle, feed) = WatchHub::new(history, header_source, watch_config);

        let hashes = Arc::new(CompactionHashes::default());
        let (hash_queue, hash_work) = hashes::hasher(Arc::clone(&state), Arc::clone(&hashes));

        let proposer = Arc::new(Proposer::new(
            raft_sender.clone(),
            Arc::clone(&waiters),
            Arc::clone(&published),
            Arc::new(PeerForwarder::new(peers.clone(), Arc::clone(&waiters))),
            Arc::clone(&metrics),
            limits.max_request_bytes,
            limits.election_timeout,
        ));
        let engine = Engine::new(Parts {
            member_id: identity.member_id,
            cluster_id: identity.cluster_id,
            state: Arc::clone(&state),
            proposer: Arc::clone(&proposer),
            published: Arc::clone(&published),
            leases: Arc::clone(&leases),
            pins: Arc::clone(&pins),
            saves: Arc::new(Semaphore::new(SAVES_MAX)),
            peers: peers.clone(),
            hub: hub_handle.clone(),
            hashes,
            rolling_hashes: Arc::clone(&rolling_hashes),
            checkpoint: checkpoint_sender.clone(),
            metrics: Arc::clone(&metrics),
            gauges: Gauges {
                member: identity.member_id,
                state: Arc::clone(&state),
                published: Arc::clone(&published),
                pins: Arc::clone(&pins),
                hub: hub_handle.clone(),
                metrics: Arc::clone(&metrics),
                seen: Mutex::default(),
            },
            fault: fault.clone(),
            stopping: signal.subscribe(),
            shortage: Arc::clone(&shortage),
            limits: limits.clone(),
            versions: Versions { server: ETCD_VERSION, storage: ETCD_STORAGE_VERSION },
        });

        let mut threads = Threads {
            raft: raft_sender.clone(),
            checkpoint: checkpoint_sender.clone(),
            waiters: Arc::clone(&waiters),
            front: Vec::new(),
            checkpointer: None,
        };
        let checkpointer = Checkpointer::new(
            checkpoint_sender,
            Arc::clone(&busy),
            Arc::clone(&shortage),
            config.snapshot_entries(),
            snapshot_index,
            applied.index,
        );
        let checkpoint_thread = CheckpointThread {
            storage: Some(storage),
            generations,
            state: Arc::clone(&state),
            pins: Arc::clone(&pins),
            tasks: checkpoint_tasks,
            log: log_sender.clone(),
            apply: apply_sender.clone(),
            durable_index: applied.index,
            overhead_bytes: 0,
            durable_revision,
            published: Arc::clone(&published),
            busy,
            shortage: Arc::clone(&shortage),
            directory: match &place {
                Place::Disk { data_dir, .. } => Some(data_dir.clone()),
                Place::Memory => None,
            },
            reopen: false,
            removed: Removed::default(),
            catch_up_entries: catch_up,
            snapshots,
            fault: fault.clone(),
            metrics: Arc::clone(&metrics),
        };
        threads.checkpointer = Some(spawn("checkpoint", &fault, move || checkpoint_thread.run())?);
        let log_thread = LogThread {
            log,
            tasks: log_tasks,
            raft: raft_sender.clone(),
            fault: fault.clone(),
            sync_times: SyncTimes::new(limits.heartbeat, limits.election_timeout),
            has_peers: {
                let peers = peers.clone();
                Box::new(move || !peers.is_empty())
            },
            metrics: Arc::clone(&metrics),
        };
        threads.front.push(spawn("log", &fault, move || log_thread.run())?);
        let apply_thread = ApplyThread {
            state: Arc::clone(&state),
            tasks: apply_tasks,
            raft: raft_sender.clone(),
            published: Arc::clone(&published),
            waiters: Arc::clone(&waiters),
            feed,
            leases: Arc::clone(&leases),
            pins: Arc::clone(&pins),
            recovered_index,
            hashes: hash_queue,
            checkpointer,
            rolling_hashes,
            pace: CompactionPace {
                keys_per_step: usize::try_from(config.compaction_batch()).unwrap_or(usize::MAX),
                pause: config.compaction_sleep(),
            },
            slow_apply: config.warning_apply_duration,
            fault: fault.clone(),
            metrics: Arc::clone(&metrics),
        };
        threads.front.push(spawn("apply", &fault, move || apply_thread.run())?);
        let images = Arc::new(Images::new(Arc::clone(&state), pins));
        let raft_parts = RaftParts {
            node,
            mailbox: raft_mailbox,
            outbox: Box::new(PeerOutbox::new(
                peers,
                Arc::clone(&images),
                raft_sender.clone(),
                Handle::current(),
                config.snapshot_send_bytes_per_sec,
            )),
            log: log_sender,
            apply: apply_sender,
            checkpoint: threads.checkpoint.clone(),
            published: Arc::clone(&published),
            waiters: Arc::clone(&waiters),
            metrics: Arc::clone(&metrics),
            fault: fault.clone(),
            tick: limits.heartbeat,
            election_timeout: limits.election_timeout,
            member: identity.member_id,
        };
        let raft_thread = RaftThread::new(raft_parts, Instant::now());
        threads.front.push(spawn("raft", &fault, move || raft_thread.run())?);

        let incoming = incoming(&place, &raft_sender)?;
        let face = Arc::new(PeerFace::new(
            engine.clone(),
            raft_sender.clone(),
            incoming,
            images,
            config.snapshot_send_bytes_per_sec,
        ));
        let compactor = AutoCompactor {
            state: Arc::clone(&state),
            proposer: Arc::clone(&proposer),
            published: Arc::clone(&published),
        };
        let duty = LeaseDuty {
            clock: leases,
            state,
            proposer,
            published: Arc::clone(&published),
            election_timeout: limits.election_timeout,
            metrics,
        };
        let mut tasks =
            vec![tokio::spawn(hub.run()), tokio::spawn(duty.run()), tokio::spawn(hash_work)];
        tasks.push(tokio::spawn(roster.follow()));
        tasks.push(tokio::spawn(engine.clone().compare_states()));
        if !config.corrupt_check_time.is_zero() {
            let check = engine.clone().check_periodically(config.corrupt_check_time);
            tasks.push(tokio::spawn(check));
        }
        if config.feature_gates.enabled(Gate::CompactHashCheck) {
            let check = engine.clone().check_compactions(config.compact_hash_check_time);
            tasks.push(tokio::spawn(check));
        }
        if let Some(retention) = retention(config) {
            tasks.push(tokio::spawn(compactor.run(retention)));
        }
        if let Place::Disk { data_dir, wal_dir, .. } = place {
            let directories = std::iter::once(data_dir).chain(wal_dir).collect();
            tasks.push(tokio::spawn(Space { directories, shortage }.watch()));
        }
        let stop = Stop { signal, hub: hub_handle.clone(), tasks, threads: Some(threads) };
        let end =
            end_on_fault(fault.clone(), waiters, hub_handle, raft_sender, stop.signal.clone());
        tokio::spawn(end);
        Ok(Member { engine, face, published, recovered_commit, fault, stop })
    }

    /// The initial corruption check: compares what this member has on disk with its peers' data.
    pub(super) async fn check(&self) -> Result<(), StartError> {
        let mut applied = self.published.applied.subscribe();
        // From the checkpoint on; nobody else is needed for that.
        let recovered = applied.wait_for(|applied| *applied >= self.recovered_commit);
        tokio::select! {
            _ = recovered => {}
            fatal = self.fault.wait() => return Err(fatal.into()),
        }
        Ok(self.engine.check_initially().await?)
    }

    /// Waits until the member has a leader and has told the cluster who it is, however long
    /// that takes: who begins with a snapshot does not hear what became of its command.
    pub(super) async fn ready(
        &self,
        config: &Config,
        client_urls: Vec<String>,
    ) -> Result<(), StartError> {
        let mut role = self.published.role.subscribe();
        let mut leader = pin!(role.wait_for(|role| role.leader != 0));
        loop {
            tokio::select! {
                _ = &mut leader => break,
                fatal = self.fault.wait() => return Err(fatal.into()),
                () = tokio::time::sleep(LEADER_WAIT_TOLD) => self.engine.log_who_is_missing(),
            }
        }
        loop {
            let published = self.engine.publish(config.name.clone(), client_urls.clone()).await;
            match published {
                Ok(()) => return Ok(()),
                Err(error) if self.fault.get().is_none() && error != Error::Stopped => {
                    // etcd tries for as long as it takes: the others may be starting, too.
                    tracing::warn!(%error, "failed to publish the member; trying again");
                    tokio::time::sleep(PUBLISH_PAUSE).await;
                }
                Err(error) => {
                    return Err(self.fault.get().map_or(StartError::Publish(error), Into::into));
                }
            }
        }
    }
}

/// What happens to the connections to other members is told to raft, and what happens to commands
/// to who waits for them.
fn peer_events(
    raft: mpsc::Sender<RaftInput>,
    waiters: Arc<Waiters>,
    fault: Fault,
    member_dir: Option<PathBuf>,
) -> Events {
    Arc::new(move |event| {
        let (id, is_broken) = match event {
            PeerEvent::Broken(id) => (id, true),
            PeerEvent::Unreachable(id) => (id, false),
            PeerEvent::Refused { sequence, reason } => {
                return waiters.refuse(sequence, forwarder::reason(reason));
            }
            PeerEvent::Removed => {
                // Short, and this member's last act.
                member_dir.iter().for_each(|dir| force::note_removal(dir));
                return fault.raise_removal();
            }
        };
        // A member that stops has no use for it.
        let _ = raft.send(RaftInput::Unreachable { id, is_broken });
    })
}

/// Where snapshots of other members arrive, which then go to raft.
fn incoming(place: &Place, raft: &mpsc::Sender<RaftInput>) -> Result<Incoming, StartError> {
    let directory = match place {
        Place::Disk { data_dir, .. } => Some(data_dir.join("member").join("snap")),
        Place::Memory => None,
    };
    let raft = raft.clone();
    let deliver = move |arrived| {
        // When raft has stopped, the sender hears that it was not taken.
        let _ = raft.send(RaftInput::Snapshot(arrived));
    };
    let has_room = {
        let directory = directory.clone();
        move |bytes| directory.as_deref().is_none_or(|at| space::has_room_for_image(at, bytes))
    };
    Incoming::open(directory.as_deref(), Arc::new(has_room), Arc::new(deliver))
        .map_err(StartError::Snapshots)
}

/// What is on disk, or a new member, with raft's timing.
async fn recover(
    config: &Config,
    place: Place,
    limits: &Limits,
    connector: &Connector,
) -> Result<Recovery, StartError> {
    let mut bootstrap = bootstrap(config);
    let is_new = {
        let place = place.clone();
        tokio::task::spawn_blocking(move || recover::is_new(&place))
            .await
            .map_err(|error| Fatal::new(error.to_string()))??
    };
    let urls = bootstrap.other_peer_urls();
    if is_new && !bootstrap.joins {
        bootstrap.running = discover::when_new(&urls, &**connector).await;
    }
    let mut recovery = match heal::open(place.clone(), bootstrap.clone(), connector).await {
        // It is new, and joins: not one that has lost no more than what says that it is not.
        Err(StartError::Open(OpenError::NoPeerAnswered)) => {
            bootstrap.running = Some(discover::when_joining(&urls, &**connector).await?);
            heal::open(place, bootstrap, connector).await?
        }
        opened => opened?,
    };
    let Recovery { state, start, identity, is_new, .. } = &mut recovery;
    start.election_ticks = limits.election_ticks() as usize;
    start.pre_vote = config.pre_vote;
    start.seed = getrandom::u64()?;
    start.catch_up_entries = config.snapshot_catchup();
    start.resume_ticks = u64::from(limits.ticks(RESUME_MAX));
    tracing::info!(
        member_id = format!("{:x}", identity.member_id),
        cluster_id = format!("{:x}", identity.cluster_id),
        name = config.name,
        data_dir = %config.data_dir.display(),
        is_new,
        applied_index = state.applied().index,
        log_start = start.start.index,
        log_entries = start.entries.len(),
        revision = state.store().revision(),
        heartbeat_interval = ?limits.heartbeat,
        election_timeout = ?limits.election_timeout,
        snapshot_count = config.snapshot_entries(),
        snapshot_catchup_entries = config.snapshot_catchup(),
        quota_backend_bytes = limits.quota_bytes,
        "starting a member"
    );
    Ok(recovery)
}

fn place(config: &Config) -> Place {
    if config.in_memory {
        return Place::Memory;
    }
    Place::Disk {
        data_dir: config.data_dir.clone(),
        wal_dir: config.wal_dir.clone(),
        fsync: !config.unsafe_no_fsync,
    }
}

fn bootstrap(config: &Config) -> Bootstrap {
    let initial_cluster = config.initial_cluster.iter().map(|(name, urls)| {
        (name.clone(), urls.iter().map(|url| url.as_str().to_owned()).collect())
    });
    Bootstrap {
        initial_cluster: initial_cluster.collect(),
        cluster_token: config.initial_cluster_token.clone(),
        name: config.name.clone(),
        cluster_version: ETCD_STORAGE_VERSION.to_owned(),
        joins: config.initial_cluster_state == ClusterState::Existing,
        running: None,
        max_learners: config.max_learners,
        force_new_cluster: config.force_new_cluster,
        import_etcd_data: config.import_etcd_data,
    }
}

fn limits(config: &Config) -> Limits {
    Limits {
        max_request_bytes: usize::try_from(config.max_request_bytes).unwrap_or(usize::MAX),
        max_txn_ops: usize::try_from(config.max_txn_ops).unwrap_or(usize::MAX),
        quota_bytes: config.quota_bytes(),
        strict_reconfig_check: config.strict_reconfig_check,
        max_learners: config.max_learners,
        heartbeat: config.heartbeat(),
        election_timeout: config.election(),
        warning_unary_request_duration: config.slow_request(),
    }
}

/// Where the log of a member that starts may be truncated at the next snapshots: as far
/// behind the checkpoint that was read as members may catch up from the log, and at the
/// checkpoint. The log is not cut there before the next snapshot is durable.
fn places_to_truncate(start: &Start, applied: Mark, catch_up_entries: u64) -> VecDeque<Mark> {
    let behind = applied.index.saturating_sub(catch_up_entries);
    let entry = start.entries.iter().find(|entry| entry.index == behind);
    let behind = entry.map(|entry| Mark { index: entry.index, term: entry.term });
    behind.into_iter().chain((applied.index > start.start.index).then_some(applied)).collect()
}

/// Settings that show in the metrics.
fn tell_settings(metrics: &Metrics, config: &Config, limits: &Limits) {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    metrics.server_quota_backend_bytes.set(signed(limits.quota_bytes.unwrap_or(0)));
    metrics.kvorum_server_heartbeat_interval_seconds.set(limits.heartbeat.as_secs_f64());
    metrics.kvorum_server_election_timeout_seconds.set(limits.election_timeout.as_secs_f64());
    metrics.kvorum_server_snapshot_count.set(signed(config.snapshot_entries()));
    metrics.kvorum_server_snapshot_catchup_entries.set(signed(config.snapshot_catchup()));
    for gate in Gate::ALL {
        let labels = [gate.name(), gate.stage().as_str()];
        let enabled = config.feature_gates.enabled(*gate);
        metrics.server_feature_enabled.with_label_values(&labels).set(enabled.into());
    }
}

fn retention(config: &Config) -> Option<Retention> {
    // A retention that is none has been refused by the configuration's check.
    match config.auto_compaction().ok().flatten()? {
        AutoCompaction::Periodic(period) => Some(Retention::Period(period)),
        AutoCompaction::Revision(kept) => Some(Retention::Revisions(kept)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_after_which_a_request_is_slow_means_the_usual_one() {
        let config = Config { warning_unary_request_duration: Duration::ZERO, ..Config::default() };
        let slow = limits(&config).warning_unary_request_duration;
        assert_eq!(slow, Duration::from_millis(300));
    }
}
