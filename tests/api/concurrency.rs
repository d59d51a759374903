//! Lock and Election.

use kvorum::pb::etcdserverpb::{LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest};
use kvorum::pb::v3electionpb::election_client::ElectionClient;
use kvorum::pb::v3electionpb::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, ProclaimRequest, ResignRequest,
};
use kvorum::pb::v3lockpb::lock_client::LockClient;
use kvorum::pb::v3lockpb::{LockRequest, LockResponse, UnlockRequest};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::rig::{Rig, keys, list_request, refused, soon, start, until};

type Locking = JoinHandle<Result<LockResponse, Status>>;

fn locks(rig: &Rig) -> LockClient<Channel> {
    LockClient::new(rig.channel.clone())
}

fn elections(rig: &Rig) -> ElectionClient<Channel> {
    ElectionClient::new(rig.channel.clone())
}

fn lock(rig: &Rig, name: &'static str, lease: i64) -> Locking {
    let mut locks = locks(rig);
    tokio::spawn(async move {
        let request = LockRequest { name: name.into(), lease };
        locks.lock(request).await.map(tonic::Response::into_inner)
    })
}

async fn unlock(rig: &Rig, key: &bytes::Bytes) {
    locks(rig).unlock(UnlockRequest { key: key.clone() }).await.unwrap();
}

async fn done<T>(task: JoinHandle<Result<T, Status>>) -> Result<T, Status> {
    soon("the call to return", task).await.unwrap()
}

/// Waits until `count` keys stand in the queue.
async fn queue(rig: &Rig, name: &str, count: usize) -> Vec<String> {
    let prefix = format!("{name}/");
    until("the queue's length", || async {
        let found = keys(&rig.range(list_request(&prefix)).await);
        (found.len() == count).then_some(found)
    })
    .await
}

async fn revoke(rig: &Rig, id: i64) {
    rig.leases().lease_revoke(LeaseRevokeRequest { id }).await.unwrap();
}

async fn lease_ids(rig: &Rig) -> Vec<i64> {
    let response = rig.leases().lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner();
    response.leases.into_iter().map(|lease| lease.id).collect()
}

#[tokio::test]
async fn a_free_lock_is_taken_at_once_under_the_name_of_the_lease() {
    let rig = start().await;
    let lease = rig.grant(100).await;
    let held = done(lock(&rig, "jobs", lease)).await.unwrap();
    assert_eq!(held.key, format!("jobs/{lease:x}"));
    assert_eq!(held.header.unwrap().revision, 2);
    assert_eq!(rig.get(&format!("jobs/{lease:x}")).await.unwrap().lease, lease);

    // The same session has it already.
    let again = done(lock(&rig, "jobs", lease)).await.unwrap();
    assert_eq!((again.key, again.header.unwrap().revision), (held.key.clone(), 2));

    unlock(&rig, &held.key).await;
    queue(&rig, "jobs", 0).await;
}

#[tokio::test]
async fn waiters_get_the_lock_in_the_order_they_came() {
    let rig = start().await;
    let mut waiting = Vec::new();
    for place in 1..=4 {
        let lease = rig.grant(100).await;
        waiting.push((lease, lock(&rig, "jobs", lease)));
        queue(&rig, "jobs", place).await;
    }
    // Another name is another lock.
    done(lock(&rig, "jobs/other", 0)).await.unwrap();
    let mut order = Vec::new();
    let leases: Vec<_> = waiting.iter().map(|(lease, _)| *lease).collect();
    for (lease, task) in waiting {
        let held = done(task).await.unwrap();
        assert_eq!(held.key, format!("jobs/{lease:x}"));
        order.push(lease);
        unlock(&rig, &held.key).await;
    }
    assert_eq!(order, leases);
}

#[tokio::test]
async fn a_lock_is_held_by_one_however_many_want_it() {
    let rig = start().await;
    let holder = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let workers: Vec<_> = (0..6)
        .map(|_| {
            let (mut locks, holder) = (locks(&rig), holder.clone());
            tokio::spawn(async move {
                use std::sync::atomic::Ordering::SeqCst;
                for _ in 0..5 {
                    let request = LockRequest { name: "jobs".into(), lease: 0 };
                    let key = locks.lock(request).await?.into_inner().key;
                    assert_eq!(holder.fetch_add(1, SeqCst), 0, "two hold the lock");
                    tokio::task::yield_now().await;
                    assert_eq!(holder.fetch_sub(1, SeqCst), 1);
                    locks.unlock(UnlockRequest { key }).await?;
                }
                Ok(())
            })
        })
        .collect();
    for worker in workers {
        done(worker).await.unwrap();
    }
}

#[tokio::test]
async fn a_lock_without_lease_gets_one_of_sixty_seconds() {
    let rig = start().await;
    let held = done(lock(&rig, "jobs", 0)).await.unwrap();
    let [id] = <[i64; 1]>::try_from(lease_ids(&rig).await).unwrap();
    assert_eq!(held.key, format!("jobs/{id:x}"));
    let request = LeaseTimeToLiveRequest { id, keys: false };
    let lease = rig.leases().lease_time_to_live(request).await.unwrap().into_inner();
    assert_eq!(lease.granted_ttl, 60);
}

#[tokio::test]
async fn a_waiter_whose_client_goes_away_leaves_the_queue() {
    let rig = start().await;
    let holder = done(lock(&rig, "jobs", 0)).await.unwrap();
    let lease = rig.grant(100).await;
    let with_lease = lock(&rig, "jobs", lease);
    queue(&rig, "jobs", 2).await;
    let without = lock(&rig, "jobs", 0);
    queue(&rig, "jobs", 3).await;
    let last_lease = rig.grant(100).await;
    let last = lock(&rig, "jobs", last_lease);
    queue(&rig, "jobs", 4).await;

    with_lease.abort();
    without.abort();
    queue(&rig, "jobs", 2).await;
    // A client keeps its lease; the one made for the call is gone with the call.
    let leases = until("the call's lease to go", || async {
        let leases = lease_ids(&rig).await;
        (leases.len() == 3).then_some(leases)
    })
    .await;
    assert!(leases.contains(&lease) && leases.contains(&last_lease));

    unlock(&rig, &holder.key).await;
    assert_eq!(done(last).await.unwrap().key, format!("jobs/{last_lease:x}"));
}

#[tokio::test]
async fn a_waiter_whose_lease_ended_is_told_when_its_turn_comes() {
    let rig = start().await;
    let holder = done(lock(&rig, "jobs", 0)).await.unwrap();
    let lease = rig.grant(100).await;
    let waiter = lock(&rig, "jobs", lease);
    queue(&rig, "jobs", 2).await;
    revoke(&rig, lease).await;
    unlock(&rig, &holder.key).await;
    refused(done(waiter).await, Code::Unknown, "mutex: session is expired");
}

#[tokio::test]
async fn errors_of_locks_have_no_code() {
    let rig = start().await;
    refused(
        done(lock(&rig, "jobs", 12345)).await,
        Code::Unknown,
        "etcdserver: requested lease not found",
    );
    refused(
        locks(&rig).unlock(UnlockRequest { key: bytes::Bytes::new() }).await,
        Code::Unknown,
        "etcdserver: key is not provided",
    );
    // To unlock what is not locked is no error.
    unlock(&rig, &"jobs/1".into()).await;
}

type Campaigning = JoinHandle<Result<CampaignResponse, Status>>;

fn campaign(rig: &Rig, lease: i64, value: &'static str) -> Campaigning {
    let mut elections = elections(rig);
    tokio::spawn(async move {
        let request = CampaignRequest { name: "chief".into(), lease, value: value.into() };
        elections.campaign(request).await.map(tonic::Response::into_inner)
    })
}

async fn leader_value(rig: &Rig) -> Result<String, Status> {
    let request = LeaderRequest { name: "chief".into() };
    let kv = elections(rig).leader(request).await?.into_inner().kv.unwrap();
    Ok(String::from_utf8(kv.value.to_vec()).unwrap())
}

async fn resign(rig: &Rig, leader: Option<LeaderKey>) -> Result<(), Status> {
    elections(rig).resign(ResignRequest { leader }).await.map(drop)
}

async fn proclaim(rig: &Rig, leader: Option<LeaderKey>, value: &'static str) -> Result<(), Status> {
    elections(rig).proclaim(ProclaimRequest { leader, value: value.into() }).await.map(drop)
}

#[tokio::test]
async fn the_first_to_campaign_leads_and_the_next_follows_when_it_resigns() {
    let rig = start().await;
    refused(leader_value(&rig).await, Code::Unknown, "election: no leader");
    let (one, two) = (rig.grant(100).await, rig.grant(100).await);
    let elected = done(campaign(&rig, one, "one")).await.unwrap();
    let leader = elected.leader.unwrap();
    assert_eq!(leader.key, format!("chief/{one:x}"));
    assert_eq!((leader.name.as_ref(), leader.lease, leader.rev), (&b"chief"[..], one, 2));
    assert_eq!(elected.header.unwrap().revision, 2);
    let follower = campaign(&rig, two, "two");
    queue(&rig, "chief", 2).await;
    assert_eq!(leader_value(&rig).await.unwrap(), "one");

    proclaim(&rig, Some(leader.clone()), "uno").await.unwrap();
    assert_eq!(leader_value(&rig).await.unwrap(), "uno");
    assert!(!follower.is_finished());

    resign(&rig, Some(leader.clone())).await.unwrap();
    let next = done(follower).await.unwrap().leader.unwrap();
    assert_eq!(next.lease, two);
    assert_eq!(leader_value(&rig).await.unwrap(), "two");

    refused(proclaim(&rig, Some(leader.clone()), "x").await, Code::Unknown, "election: not leader");
    resign(&rig, Some(leader)).await.unwrap();
    assert_eq!(leader_value(&rig).await.unwrap(), "two", "to resign twice harms nobody");
}

#[tokio::test]
async fn a_campaign_of_the_leader_proclaims_its_new_value() {
    let rig = start().await;
    let lease = rig.grant(100).await;
    let first = done(campaign(&rig, lease, "old")).await.unwrap().leader.unwrap();
    let again = done(campaign(&rig, lease, "new")).await.unwrap().leader.unwrap();
    assert_eq!(again, first);
    assert_eq!(leader_value(&rig).await.unwrap(), "new");
}

#[tokio::test]
async fn requests_without_a_leader_key_are_refused() {
    let rig = start().await;
    let text = "\"leader\" field must be provided";
    refused(resign(&rig, None).await, Code::Unknown, text);
    refused(proclaim(&rig, None, "x").await, Code::Unknown, text);
    refused(
        done(campaign(&rig, 12345, "x")).await,
        Code::Unknown,
        "etcdserver: requested lease not found",
    );
}

#[tokio::test]
async fn a_candidate_whose_client_goes_away_leaves_the_queue() {
    let rig = start().await;
    let leader = done(campaign(&rig, 0, "one")).await.unwrap().leader.unwrap();
    let lease = rig.grant(100).await;
    let candidate = campaign(&rig, lease, "two");
    queue(&rig, "chief", 2).await;
    candidate.abort();
    let left = queue(&rig, "chief", 1).await;
    assert_eq!(left, [String::from_utf8(leader.key.to_vec()).unwrap()]);
}

#[tokio::test]
async fn observers_see_every_value_of_every_leader() {
    let rig = start().await;
    let request = LeaderRequest { name: "chief".into() };
    let mut observer = elections(&rig);
    let observing = tokio::spawn(async move { observer.observe(request).await });
    let (one, two) = (rig.grant(100).await, rig.grant(100).await);
    let first = done(campaign(&rig, one, "a")).await.unwrap().leader.unwrap();
    let mut observed = done(observing).await.unwrap().into_inner();
    let mut next = async || {
        let answer = soon("a leader's value", observed.message()).await.unwrap().unwrap();
        assert!(answer.header.is_some());
        let kv = answer.kv.unwrap();
        (kv.lease, String::from_utf8(kv.value.to_vec()).unwrap())
    };
    assert_eq!(next().await, (one, "a".to_owned()));
    proclaim(&rig, Some(first), "b").await.unwrap();
    assert_eq!(next().await, (one, "b".to_owned()));
    let follower = campaign(&rig, two, "c");
    queue(&rig, "chief", 2).await;
    revoke(&rig, one).await;
    done(follower).await.unwrap();
    assert_eq!(next().await, (two, "c".to_owned()));
}
