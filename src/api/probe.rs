//! The engine, as the health endpoints see it.

use super::http::{HealthSource, Versions};
use crate::engine::Engine;
use crate::error::Error;
use crate::pb::etcdserverpb::AlarmMember;

impl HealthSource for Engine {
    async fn linearizable_read(&self) -> Result<(), Error> {
        self.serializable_check()?;
        self.linearizable_barrier().await
    }

    async fn serializable_read(&self) -> Result<(), Error> {
        self.serializable_check()
    }

    fn has_leader(&self) -> bool {
        Engine::has_leader(self)
    }

    fn alarms(&self) -> Vec<AlarmMember> {
        Engine::alarms(self)
    }

    fn is_learner(&self) -> bool {
        Engine::is_learner(self)
    }

    fn versions(&self) -> Versions {
        let versions = Engine::versions(self);
        Versions {
            server: versions.server.to_owned(),
            cluster: Some(self.cluster_version()),
            storage: Some(versions.storage.to_owned()),
        }
    }

    fn raft_status(&self) -> serde_json::Value {
        let status = self.raft_status();
        serde_json::json!({
            "id": format!("{:x}", self.member_id()),
            "term": status.term,
            "commit": status.committed,
            "applied": status.applied,
            "lead": format!("{:x}", status.leader),
            "raftState": if status.is_leader { "StateLeader" } else { "StateFollower" },
        })
    }

    fn refresh_metrics(&self) {
        Engine::refresh_metrics(self);
    }
}
