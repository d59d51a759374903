//! Following the members: whom to connect to, and whether this one still belongs.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;

use super::fault::Fault;
use super::published::Published;
use crate::net::{PeerAddress, Peers};
use crate::state::StateMachine;

/// A member that was removed stops after this: those who have yet to learn it from this one
/// have that long. etcd takes an election timeout.
const FAREWELL: Duration = Duration::from_secs(1);

/// See the module documentation.
pub struct Roster {
    /// Where the members are recorded.
    pub state: Arc<RwLock<StateMachine>>,
    /// Tells when they change.
    pub published: Arc<Published>,
    /// The connections.
    pub peers: Peers,
    /// Told when this member was removed.
    pub fault: Fault,
}

impl Roster {
    /// Runs until the future is dropped.
    pub async fn follow(self) {
        let mut changes = self.published.members.subscribe();
        loop {
            changes.mark_unchanged();
            self.connect();
            if self.is_removed() {
                tokio::time::sleep(FAREWELL).await;
                self.fault.raise_removal();
                return;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Connects to those who are members now.
    pub fn connect(&self) {
        let members = self.state.read().members().records();
        let addresses =
            members.into_iter().map(|member| PeerAddress { id: member.id, urls: member.peer_urls });
        self.peers.update(&addresses.collect::<Vec<_>>());
    }

    fn is_removed(&self) -> bool {
        let state = self.state.read();
        state.members().is_removed(state.member_id())
    }
}
