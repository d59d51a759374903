//! Asking the leader, for what it alone knows.

use std::time::{Duration, Instant};

use super::Engine;
use crate::error::Error;
use crate::net::Client;

/// A call to the leader that failed is tried again after this; etcd's value.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

impl Engine {
    /// Has the leader answer: this member by `here` when it leads, another one by `there`. Waits
    /// for a leader, and asks again when the one that was asked is no more, for as long as a
    /// request may take.
    pub(super) async fn at_leader<T, Here, There>(
        &self,
        here: impl Fn() -> Here,
        there: impl Fn(Client) -> There,
    ) -> Result<T, Error>
    where
        Here: Future<Output = Result<T, Error>>,
        There: Future<Output = Result<T, Option<Error>>>,
    {
        let deadline = Instant::now() + self.request_timeout();
        let mut role = self.parts.published.role.subscribe();
        let mut stopped = self.parts.published.stopped.subscribe();
        loop {
            let leader = tokio::select! {
                role = role.wait_for(|role| role.leader != 0) => {
                    role.map_err(|_| Error::Stopped)?.leader
                }
                _ = stopped.wait_for(|stopped| *stopped) => return Err(Error::Stopped),
                () = tokio::time::sleep_until(deadline.into()) => return Err(Error::NoLeader),
            };
            let asked = async {
                if leader == self.parts.member_id {
                    return here().await;
                }
                let client = self.parts.peers.client(leader).ok_or(Error::NotLeader)?;
                // One that does not answer may be no leader any more.
                there(client).await.map_err(|refused| refused.unwrap_or(Error::NotLeader))
            };
            match tokio::time::timeout_at(deadline.into(), asked).await {
                Err(_) => return Err(Error::Timeout),
                Ok(Err(Error::NotLeader | Error::NoLeader | Error::LeaderChanged)) => {
                    if Instant::now() + RETRY_PAUSE >= deadline {
                        return Err(Error::Timeout);
                    }
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                // That the leader stops is no reason to stop here.
                Ok(Err(Error::Stopped)) if leader != self.parts.member_id => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Ok(answered) => return answered,
            }
        }
    }
}
