//! What is done to the cluster: each fault breaks something, waits, and puts it right.

use std::io;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, MemberAddOptions};
use rustix::process::Signal;
use serde::Serialize;

use crate::client::TIMEOUT;
use crate::cluster::Cluster;
use crate::rng::Rng;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// kill -9 of one member.
    Kill,
    /// kill -9 of the leader.
    KillLeader,
    /// kill -9 of all members at once.
    KillAll,
    /// A member is asked to end, and started again.
    Restart,
    /// The leader does nothing for longer than the election timeout.
    StopLeader,
    /// Any member does nothing for a while.
    Stop,
    /// The leader is cut off from all others.
    IsolateLeader,
    /// Any member is cut off from all others.
    Isolate,
    /// A member hears the others, but they do not hear it.
    Mute,
    /// The others hear a member, but it does not hear them.
    Deaf,
    /// Two halves that only one member can talk to both of.
    Bridge,
    /// A minority and a majority.
    Split,
    /// Everything between two members is late.
    Delay,
    /// A member is cut off until it needs a snapshot.
    Snapshot,
    /// A member's disk hangs again and again.
    SlowDisk,
    /// A member's disk is full.
    FullDisk,
    /// A member is removed, loses everything, and is added again.
    Replace,
    /// A member's storage is compacted on disk.
    Defragment,
    /// The leader hands over.
    MoveLeader,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 19] = [
        Fault::Kill,
        Fault::KillLeader,
        Fault::KillAll,
        Fault::Restart,
        Fault::StopLeader,
        Fault::Stop,
        Fault::IsolateLeader,
        Fault::Isolate,
        Fault::Mute,
        Fault::Deaf,
        Fault::Bridge,
        Fault::Split,
        Fault::Delay,
        Fault::Snapshot,
        Fault::SlowDisk,
        Fault::FullDisk,
        Fault::Replace,
        Fault::Defragment,
        Fault::MoveLeader,
    ];

    /// Its name on the command line.
    pub fn name(self) -> String {
        let json = serde_json::to_string(&self).unwrap_or_default();
        json.trim_matches('"').to_owned()
    }

    /// Whether it takes a disk of the member's own.
    pub fn needs_disk(self) -> bool {
        matches!(self, Fault::SlowDisk | Fault::FullDisk)
    }
}

/// What a fault found that it should not have.
pub type Complaint = String;

/// Breaks things.
pub struct Breaker<'a> {
    /// What is broken.
    pub cluster: &'a mut Cluster,
    /// Decides whom and for how long.
    pub rng: Rng,
    /// Members that ended by themselves although nothing allowed them to.
    pub complaints: Vec<Complaint>,
    /// The longest that a fault lasts.
    pub longest_ms: i64,
}

impl Breaker<'_> {
    fn count(&self) -> usize {
        self.cluster.members.len()
    }

    /// How long to leave it broken.
    async fn wait(&mut self) {
        let longest_ms = self.longest_ms;
        tokio::time::sleep(Duration::from_millis(self.rng.between(100, longest_ms) as u64)).await;
    }

    /// Longer than an election takes.
    async fn wait_election(&mut self) {
        let election_ms = self.cluster.settings.timing_ms.1;
        let more_ms = self.rng.between(200, self.longest_ms) as u64;
        tokio::time::sleep(Duration::from_millis(2 * election_ms + more_ms)).await;
    }

    /// The leader, as some member sees it, or else anybody.
    async fn leader(&mut self) -> usize {
        for member in 0..self.count() {
            let Some(status) = status(&self.cluster.endpoint(member)).await else { continue };
            for other in 0..self.count() {
                let Some(of_other) = status_header(&self.cluster.endpoint(other)).await else {
                    continue;
                };
                if of_other == status {
                    return other;
                }
            }
        }
        self.rng.below(self.count())
    }

    /// Does one fault from beginning to end.
    pub async fn run(&mut self, fault: Fault) -> io::Result<()> {
        let (count, any) = (self.count(), self.rng.below(self.count()));
        match fault {
            Fault::Kill => self.kill(&[any], Signal::KILL).await?,
            Fault::KillLeader => {
                let leader = self.leader().await;
                self.kill(&[leader], Signal::KILL).await?;
            }
            Fault::KillAll => self.kill(&(0..count).collect::<Vec<_>>(), Signal::KILL).await?,
            Fault::Restart => self.kill(&[any], Signal::TERM).await?,
            Fault::StopLeader | Fault::Stop => {
                let member = if fault == Fault::Stop { any } else { self.leader().await };
                self.cluster.signal(member, Signal::STOP);
                self.wait_election().await;
                self.cluster.signal(member, Signal::CONT);
            }
            Fault::IsolateLeader | Fault::Isolate => {
                let member = if fault == Fault::Isolate { any } else { self.leader().await };
                self.partition(|from, to| (from == member) != (to == member)).await;
            }
            Fault::Mute => self.partition(|from, to| from == any && to != any).await,
            Fault::Deaf => self.partition(|from, to| from != any && to == any).await,
            Fault::Bridge => {
                // The members after the bridge in a circle, first half and second half.
                let side = |member: usize| match (member + count - any) % count {
                    0 => None,
                    place => Some(place <= (count - 1) / 2),
                };
                self.partition(|from, to| {
                    side(from).is_some_and(|a| side(to).is_some_and(|b| a != b))
                })
                .await;
            }
            Fault::Split => {
                let is_minority = |member: usize| (member + count - any) % count < count / 2;
                self.partition(|from, to| is_minority(from) != is_minority(to)).await;
            }
            Fault::Delay => {
                let delay = Duration::from_millis(self.rng.between(5, 150) as u64);
                for from in 0..count {
                    for to in (0..count).filter(|to| (from == any) != (*to == any)) {
                        self.cluster.links.delay(from, to, delay);
                    }
                }
                self.wait().await;
                self.cluster.links.mend(false);
            }
            Fault::Snapshot => self.fall_behind(any).await,
            Fault::SlowDisk => self.slow_disk(any).await?,
            Fault::FullDisk => self.full_disk(any).await?,
            Fault::Replace => self.replace(any).await?,
            Fault::Defragment => {
                if let Some(mut client) = connect(&[self.cluster.endpoint(any)]).await {
                    let _ = tokio::time::timeout(10 * TIMEOUT, client.defragment()).await;
                }
            }
            Fault::MoveLeader => {
                let leader = self.leader().await;
                let target = status_header(&self.cluster.endpoint((leader + 1) % count)).await;
                let client = connect(&[self.cluster.endpoint(leader)]).await;
                if let (Some(mut client), Some(target)) = (client, target) {
                    let _ = tokio::time::timeout(10 * TIMEOUT, client.move_leader(target)).await;
                }
            }
        }
        self.look_after(None)
    }

    async fn kill(&mut self, members: &[usize], signal: Signal) -> io::Result<()> {
        self.look_after(None)?;
        for member in members {
            self.cluster.signal(*member, signal);
        }
        for member in members {
            self.cluster.end(*member, signal).await?;
        }
        self.wait().await;
        for member in members {
            self.cluster.spawn(*member)?;
        }
        Ok(())
    }

    async fn partition(&mut self, is_cut: impl Fn(usize, usize) -> bool) {
        for from in 0..self.count() {
            for to in (0..self.count()).filter(|to| from != *to && is_cut(from, *to)) {
                self.cluster.links.cut(from, to);
            }
        }
        self.wait_election().await;
        let is_reset = self.rng.chance(50);
        self.cluster.links.mend(is_reset);
    }

    /// Cuts a member off until the others have forgotten what it lacks.
    async fn fall_behind(&mut self, member: usize) {
        const SNAPSHOTS: u64 = 3;
        const DEADLINE: Duration = Duration::from_secs(15);
        let others: Vec<String> = (0..self.count())
            .filter(|other| *other != member)
            .map(|other| self.cluster.endpoint(other))
            .collect();
        for other in (0..self.count()).filter(|other| *other != member) {
            self.cluster.links.cut(member, other);
            self.cluster.links.cut(other, member);
        }
        let applied = async || match others.first() {
            Some(other) => applied(other).await.unwrap_or(0),
            None => 0,
        };
        let begin = applied().await;
        let entries = SNAPSHOTS * self.cluster.settings.snapshot_count;
        let behind = async {
            while applied().await < begin + entries {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        // Slow traffic does not reach it in time: then it was a long partition.
        let _ = tokio::time::timeout(DEADLINE, behind).await;
        let is_reset = self.rng.chance(50);
        self.cluster.links.mend(is_reset);
    }

    async fn slow_disk(&mut self, member: usize) -> io::Result<()> {
        for _ in 0..self.rng.between(2, 10) {
            let (frozen_ms, thawed_ms) = (self.rng.between(20, 700), self.rng.between(5, 200));
            let Some(disk) = &self.cluster.members[member].disk else { return Ok(()) };
            disk.freeze()?;
            tokio::time::sleep(Duration::from_millis(frozen_ms as u64)).await;
            disk.thaw()?;
            tokio::time::sleep(Duration::from_millis(thawed_ms as u64)).await;
        }
        Ok(())
    }

    async fn full_disk(&mut self, member: usize) -> io::Result<()> {
        let Some(disk) = &self.cluster.members[member].disk else { return Ok(()) };
        disk.fill()?;
        self.wait_election().await;
        if let Some(disk) = &self.cluster.members[member].disk {
            disk.empty()?;
        }
        // It may have ended for want of room, now or a little later.
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        self.look_after(Some(member))
    }

    /// Removes a member and lets an empty one take its place, half of the time as a learner
    /// first.
    async fn replace(&mut self, member: usize) -> io::Result<()> {
        const ATTEMPTS: usize = 60;
        const PAUSE: Duration = Duration::from_millis(500);
        let others = (0..self.count()).filter(|other| *other != member);
        let others: Vec<String> = others.map(|other| self.cluster.endpoint(other)).collect();
        let Some(id) = status_header(&self.cluster.endpoint(member)).await else { return Ok(()) };
        let (url, is_learner) = (self.cluster.peer_url(member), self.rng.chance(50));
        let mut client = connect(&others).await.ok_or_else(|| io::Error::other("no client"))?;
        // A cluster that has just elected refuses changes for a while, and a change whose
        // answer was lost may have been made: so the list decides.
        let mut is_removed = false;
        for _ in 0..ATTEMPTS {
            let _ = tokio::time::timeout(5 * TIMEOUT, client.member_remove(id)).await;
            let list = tokio::time::timeout(5 * TIMEOUT, client.member_list()).await;
            if let Ok(Ok(list)) = list
                && list.members().iter().all(|member| member.id() != id)
            {
                is_removed = true;
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        if !is_removed {
            self.complaints
                .push(format!("member {id:x} could not be removed in {ATTEMPTS} attempts"));
            return Ok(());
        }
        self.cluster.end(member, Signal::KILL).await?;
        self.cluster.wipe(member)?;
        let mut new_id = None;
        for _ in 0..ATTEMPTS {
            let options = is_learner.then(|| MemberAddOptions::new().with_is_learner());
            let _ = tokio::time::timeout(5 * TIMEOUT, client.member_add([&url], options)).await;
            let list = tokio::time::timeout(5 * TIMEOUT, client.member_list()).await;
            if let Ok(Ok(list)) = list {
                let added = list.members().iter().find(|member| member.peer_urls().contains(&url));
                new_id = added.map(etcd_client::Member::id);
            }
            if new_id.is_some() {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        let Some(new_id) = new_id else {
            self.complaints.push(format!("no member could be added in {ATTEMPTS} attempts"));
            return Ok(());
        };
        self.cluster.spawn(member)?;
        for _ in 0..ATTEMPTS {
            let list = tokio::time::timeout(5 * TIMEOUT, client.member_list()).await;
            if let Ok(Ok(list)) = list
                && list.members().iter().any(|member| member.id() == new_id && !member.is_learner())
            {
                return Ok(());
            }
            // Refused until the learner has caught up.
            let _ = tokio::time::timeout(5 * TIMEOUT, client.member_promote(new_id)).await;
            tokio::time::sleep(PAUSE).await;
        }
        self.complaints.push(format!("learner {new_id:x} was not promoted in {ATTEMPTS} attempts"));
        Ok(())
    }

    /// Starts members again that ended by themselves, which only `excused` may do.
    pub fn look_after(&mut self, excused: Option<usize>) -> io::Result<()> {
        for member in 0..self.count() {
            if let Some(status) = self.cluster.exit_of(member) {
                if excused != Some(member) {
                    let name = &self.cluster.members[member].name;
                    self.complaints.push(format!("{name} ended by itself: {status}"));
                }
                self.cluster.spawn(member)?;
            }
        }
        Ok(())
    }
}

/// A client for a few calls.
pub async fn connect(endpoints: &[String]) -> Option<Client> {
    let options = ConnectOptions::new().with_connect_timeout(TIMEOUT).with_timeout(10 * TIMEOUT);
    Client::connect(endpoints, Some(options)).await.ok()
}

/// The id of the leader, as a member sees it.
async fn status(endpoint: &str) -> Option<u64> {
    let mut client = connect(&[endpoint.to_owned()]).await?;
    let response = tokio::time::timeout(TIMEOUT, client.status()).await.ok()?.ok()?;
    Some(response.leader()).filter(|leader| *leader != 0)
}

/// The id of the member itself.
async fn status_header(endpoint: &str) -> Option<u64> {
    let mut client = connect(&[endpoint.to_owned()]).await?;
    let response = tokio::time::timeout(TIMEOUT, client.status()).await.ok()?.ok()?;
    Some(response.header()?.member_id())
}

/// How many entries a member has applied.
async fn applied(endpoint: &str) -> Option<u64> {
    let mut client = connect(&[endpoint.to_owned()]).await?;
    let response = tokio::time::timeout(TIMEOUT, client.status()).await.ok()?.ok()?;
    Some(response.raft_applied_index())
}
