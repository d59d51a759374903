//! Metrics that are read off the server when somebody scrapes it.
//!
//! A size, a revision or a number of watchers is known at any time; writing it to a
//! gauge with every change would cost the threads that serve. So [`Gauges::refresh`]
//! writes them all, and whoever renders the metrics calls it first.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::{Mutex, RwLock};

use super::pins::Pins;
use super::published::Published;
use super::watch_hub::HubHandle;
use crate::metrics::Metrics;
use crate::pb::etcdserverpb::{AlarmMember, AlarmType};
use crate::state::StateMachine;

/// See the module documentation.
pub struct Gauges {
    /// This member.
    pub member: u64,
    /// Keys, revisions, members and alarms.
    pub state: Arc<RwLock<StateMachine>>,
    /// The size of the checkpoint.
    pub published: Arc<Published>,
    /// Reads under way.
    pub pins: Arc<Pins>,
    /// Watchers.
    pub hub: HubHandle,
    /// What is written.
    pub metrics: Arc<Metrics>,
    /// Series that have to go to zero when what they count is gone. Also lets one
    /// scrape at a time do its sums.
    pub seen: Mutex<Seen>,
}

/// What earlier scrapes told of. Bounded by the members there ever were.
#[derive(Debug, Default)]
pub struct Seen {
    members: BTreeSet<u64>,
    alarms: BTreeSet<(u64, i32)>,
}

impl Gauges {
    /// Brings the metrics up to date. Takes the state's lock for a moment.
    pub fn refresh(&self) {
        let mut seen = self.seen.lock();
        let metrics = &self.metrics;
        {
            let state = self.state.read();
            let store = state.store();
            metrics.debugging_mvcc_keys_total.set(signed(store.keys_total()));
            metrics.debugging_mvcc_current_revision.set(store.revision());
            metrics.debugging_mvcc_compact_revision.set(store.compact_revision());
            let in_use = store.size_in_use_bytes();
            metrics.mvcc_db_total_size_in_use_in_bytes.set(signed(in_use));
            let total = self.published.checkpoint_bytes().max(in_use);
            metrics.mvcc_db_total_size_in_bytes.set(signed(total));

            let members = state.members().records();
            let learner = members.iter().any(|one| one.id == self.member && one.is_learner);
            metrics.server_is_learner.set(i64::from(learner));
            let members = members.iter().map(|member| member.id).collect();
            self.set_members(&mut seen, &members);
            self.set_alarms(&mut seen, &state.alarms(AlarmType::None));
        }
        metrics.mvcc_db_open_read_transactions.set(signed(self.pins.readers() as u64));
        // Users and roles have not changed since there were none.
        metrics.debugging_auth_revision.set(1);

        let watches = self.hub.stats();
        let now = |gauge: &std::sync::atomic::AtomicUsize| {
            i64::try_from(gauge.load(Ordering::Relaxed)).unwrap_or(i64::MAX)
        };
        metrics.debugging_mvcc_watcher_total.set(now(&watches.watchers));
        metrics.debugging_mvcc_watch_stream_total.set(now(&watches.streams));
        metrics.debugging_mvcc_slow_watcher_total.set(now(&watches.slow_watchers));
        metrics.debugging_mvcc_pending_events_total.set(now(&watches.pending_events));
        let events = &metrics.debugging_mvcc_events_total;
        let sent = watches.events_total.load(Ordering::Relaxed);
        events.inc_by(sent.saturating_sub(events.get()));
    }

    fn set_members(&self, seen: &mut Seen, members: &BTreeSet<u64>) {
        seen.members.extend(members);
        for member in &seen.members {
            let labels = [format!("{:x}", self.member), format!("{member:x}")];
            let known = i64::from(members.contains(member));
            self.metrics.network_known_peers.with_label_values(&labels).set(known);
        }
    }

    fn set_alarms(&self, seen: &mut Seen, alarms: &[AlarmMember]) {
        seen.alarms.extend(alarms.iter().map(|alarm| (alarm.member_id, alarm.alarm)));
        for &(member_id, alarm) in &seen.alarms {
            let active = alarms.contains(&AlarmMember { member_id, alarm });
            let name = AlarmType::try_from(alarm).map_or("NONE", |alarm| alarm.as_str_name());
            let labels = [format!("{member_id:x}"), name.to_owned()];
            self.metrics.debugging_server_alarms.with_label_values(&labels).set(active.into());
        }
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
