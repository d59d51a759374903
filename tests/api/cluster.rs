//! Members, leadership, hashes, alarms: the Cluster and Maintenance services.

use kvorum::Config;
use kvorum::pb::etcdserverpb::alarm_request::AlarmAction;
use kvorum::pb::etcdserverpb::downgrade_request::DowngradeAction;
use kvorum::pb::etcdserverpb::{
    AlarmRequest, AlarmType, DefragmentRequest, DowngradeRequest, DowngradeResponse, HashKvRequest,
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberPromoteRequest,
    MemberRemoveRequest, MemberUpdateRequest, MoveLeaderRequest, StatusRequest,
};
use tonic::{Code, Status};

use crate::rig::{Rig, put_request, refused, start, start_with};

async fn only_member(rig: &Rig) -> kvorum::pb::etcdserverpb::Member {
    let request = MemberListRequest { linearizable: true };
    let response = rig.members().member_list(request).await.unwrap().into_inner();
    let header = response.header.unwrap();
    assert_eq!(header.revision, 0, "etcd has no revision in these headers");
    let [member] = <[_; 1]>::try_from(response.members).unwrap();
    assert_eq!(member.id, header.member_id);
    member
}

#[tokio::test]
async fn the_member_is_listed_with_its_name_and_urls() {
    let rig = start().await;
    let member = only_member(&rig).await;
    assert_eq!(member.name, "default");
    assert!(!member.is_learner && member.id != 0);
    assert!(!member.peer_ur_ls.is_empty() && !member.client_ur_ls.is_empty());
}

const NOT_FOUND: &str = "etcdserver: member not found";
const NOT_ENOUGH_STARTED: &str =
    "etcdserver: re-configuration failed due to not enough started members";

fn urls(port: u16) -> Vec<String> {
    vec![format!("http://127.0.0.1:{port}")]
}

async fn add(
    rig: &Rig,
    peer_ur_ls: Vec<String>,
    is_learner: bool,
) -> Result<MemberAddResponse, Status> {
    let request = MemberAddRequest { peer_ur_ls, is_learner };
    Ok(rig.members().member_add(request).await?.into_inner())
}

async fn remove(rig: &Rig, id: u64) -> Result<Vec<Member>, Status> {
    let response = rig.members().member_remove(MemberRemoveRequest { id }).await?.into_inner();
    assert_eq!(response.header.unwrap().revision, 0);
    Ok(response.members)
}

async fn update(rig: &Rig, id: u64, peer_ur_ls: Vec<String>) -> Result<Vec<Member>, Status> {
    let request = MemberUpdateRequest { id, peer_ur_ls };
    let response = rig.members().member_update(request).await?.into_inner();
    assert_eq!(response.header.unwrap().revision, 0);
    Ok(response.members)
}

async fn promote(rig: &Rig, id: u64) -> Result<Vec<Member>, Status> {
    let response = rig.members().member_promote(MemberPromoteRequest { id }).await?.into_inner();
    Ok(response.members)
}

#[tokio::test]
async fn a_learner_comes_and_goes() {
    let rig = start().await;
    let here = only_member(&rig).await;
    let added = add(&rig, urls(1), true).await.unwrap();
    assert_eq!(added.header.unwrap().revision, 0);
    let learner = added.member.unwrap();
    assert!(learner.id != 0 && learner.is_learner && learner.name.is_empty());
    assert_eq!((&learner.peer_ur_ls, learner.client_ur_ls.len()), (&urls(1), 0));
    assert_eq!(added.members.len(), 2);
    assert!(added.members.contains(&learner) && added.members.contains(&here));
    assert!(added.members.is_sorted_by_key(|member| member.id));

    let precondition = Code::FailedPrecondition;
    let used = "etcdserver: Peer URLs already exists";
    // Not of that URL alone: within a second the id would be the same one.
    refused(add(&rig, [urls(1), urls(2)].concat(), true).await, precondition, used);
    refused(add(&rig, here.peer_ur_ls.clone(), false).await, precondition, used);
    let too_many = "etcdserver: too many learner members in cluster";
    refused(add(&rig, urls(2), true).await, precondition, too_many);

    refused(update(&rig, learner.id, here.peer_ur_ls.clone()).await, precondition, used);
    let bad = "etcdserver: given member URLs are invalid";
    refused(update(&rig, learner.id, Vec::new()).await, Code::InvalidArgument, bad);
    let members = update(&rig, learner.id, urls(3)).await.unwrap();
    let learner = Member { peer_ur_ls: urls(3), ..learner };
    assert!(members.contains(&learner) && members.contains(&here));

    let behind = "etcdserver: can only promote a learner member which is in sync with leader";
    refused(promote(&rig, learner.id).await, precondition, behind);

    assert_eq!(remove(&rig, learner.id).await.unwrap(), [here]);
    refused(remove(&rig, learner.id).await, Code::NotFound, NOT_FOUND);
    refused(update(&rig, learner.id, urls(3)).await, Code::NotFound, NOT_FOUND);
    refused(promote(&rig, learner.id).await, Code::NotFound, NOT_FOUND);
    assert!(add(&rig, urls(4), true).await.is_ok(), "there is room again");
    rig.put("k", "v").await;
}

/// From then on two must agree, and one was never started.
#[tokio::test]
async fn the_only_member_may_add_a_voter() {
    let rig = start().await;
    let both = vec![" http://b:2380".to_owned(), "http://a:2380 ".to_owned()];
    let added = add(&rig, both, false).await.unwrap();
    let voter = added.member.unwrap();
    assert!(!voter.is_learner);
    assert_eq!(voter.peer_ur_ls, ["http://a:2380", "http://b:2380"]);
    assert_eq!(added.members.len(), 2);
    let local = MemberListRequest { linearizable: false };
    let listed = rig.members().member_list(local).await.unwrap().into_inner().members;
    assert_eq!(listed, added.members);
    refused(add(&rig, urls(2), false).await, Code::Unknown, NOT_ENOUGH_STARTED);
}

#[tokio::test]
async fn changes_of_members_are_refused_in_etcds_words() {
    let rig = start().await;
    let here = only_member(&rig).await.id;
    for is_learner in [false, true] {
        let bad = "etcdserver: given member URLs are invalid";
        refused(add(&rig, Vec::new(), is_learner).await, Code::InvalidArgument, bad);
        let nonsense = vec!["nonsense".to_owned()];
        refused(add(&rig, nonsense, is_learner).await, Code::InvalidArgument, bad);
    }
    refused(remove(&rig, here ^ 1).await, Code::NotFound, NOT_FOUND);
    refused(update(&rig, here ^ 1, urls(1)).await, Code::NotFound, NOT_FOUND);
    refused(update(&rig, here ^ 1, Vec::new()).await, Code::NotFound, NOT_FOUND);
    refused(promote(&rig, here ^ 1).await, Code::NotFound, NOT_FOUND);
    let voter = "etcdserver: can only promote a learner member";
    refused(promote(&rig, here).await, Code::FailedPrecondition, voter);
    refused(remove(&rig, here).await, Code::Unknown, NOT_ENOUGH_STARTED);
}

#[tokio::test]
async fn the_last_voter_stays_whatever_the_flags_say() {
    let config = Config { strict_reconfig_check: false, max_learners: 2, ..Config::in_memory() };
    let rig = start_with(config).await;
    let here = only_member(&rig).await.id;
    for port in [1, 2] {
        add(&rig, urls(port), true).await.unwrap();
    }
    refused(remove(&rig, here).await, Code::Unknown, NOT_ENOUGH_STARTED);
    rig.put("k", "v").await;
}

#[tokio::test]
async fn leadership_moves_to_the_leader_only() {
    let rig = start().await;
    let here = only_member(&rig).await.id;
    let to = async |target_id| rig.maintenance().move_leader(MoveLeaderRequest { target_id }).await;
    assert!(to(here).await.unwrap().into_inner().header.is_none());
    refused(to(here ^ 1).await, Code::FailedPrecondition, "etcdserver: bad leader transferee");
}

#[tokio::test]
async fn downgrades_are_refused_in_etcds_words_first() {
    let rig = start().await;
    let status = rig.maintenance().status(StatusRequest {}).await.unwrap().into_inner();
    let (major, minor) = {
        let mut numbers = status.version.split('.').map(|number| number.parse::<u64>().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap())
    };
    let call =
        async |action: DowngradeAction, version: &str| -> Result<DowngradeResponse, Status> {
            let request = DowngradeRequest { action: action.into(), version: version.to_owned() };
            Ok(rig.maintenance().downgrade(request).await?.into_inner())
        };
    let malformed = "etcdserver: wrong downgrade target version format";
    let invalid = "etcdserver: invalid downgrade target version";
    for action in [DowngradeAction::Validate, DowngradeAction::Enable] {
        refused(call(action, "latest").await, Code::InvalidArgument, malformed);
        let same = format!("{major}.{minor}");
        refused(call(action, &same).await, Code::InvalidArgument, invalid);
        let lower = format!("{major}.{}.0", minor - 1);
        assert_eq!(call(action, &lower).await.unwrap_err().code(), Code::Unimplemented);
    }
    let cancelled = call(DowngradeAction::Cancel, "").await.unwrap();
    assert_eq!(cancelled.version, format!("{major}.{minor}"));
    let unknown = DowngradeRequest { action: 17, version: "3.5".to_owned() };
    refused(
        rig.maintenance().downgrade(unknown).await,
        Code::Unknown,
        "etcdserver: unknown method",
    );
}

#[tokio::test]
async fn equal_stores_have_equal_hashes() {
    let (one, two) = (start().await, start().await);
    let hash = async |rig: &Rig, revision| {
        let request = HashKvRequest { revision };
        Ok::<_, Status>(rig.maintenance().hash_kv(request).await?.into_inner())
    };
    for rig in [&one, &two] {
        rig.put("a", "1").await;
        rig.put("b", "2").await;
    }
    let before = hash(&one, 0).await.unwrap();
    assert_eq!((before.hash_revision, before.compact_revision), (3, -1));
    assert_eq!(before.hash, hash(&two, 0).await.unwrap().hash);
    one.put("c", "3").await;
    assert_ne!(before.hash, hash(&one, 0).await.unwrap().hash);
    let past = hash(&one, 3).await.unwrap();
    assert_eq!(past.hash, before.hash);
    assert_eq!(past.header.unwrap().revision, 4);
    refused(
        hash(&one, 9).await,
        Code::OutOfRange,
        "etcdserver: mvcc: required revision is a future revision",
    );
}

/// Members are compared whenever it is time to, also when all history has just gone.
#[tokio::test]
async fn a_hash_just_after_a_compaction_is_no_error() {
    let rig = start().await;
    for value in ["1", "2", "3"] {
        let revision = rig.put("a", value).await;
        rig.compact(revision).await.unwrap();
        for asked in [0, revision] {
            let request = HashKvRequest { revision: asked };
            let hash = rig.maintenance().hash_kv(request).await.unwrap().into_inner();
            assert_eq!(hash.hash_revision, revision);
        }
    }
}

#[tokio::test]
async fn the_nospace_alarm_stops_puts_until_it_is_disarmed() {
    let rig = start().await;
    let here = only_member(&rig).await.id;
    let alarm = async |action: AlarmAction| {
        let request = AlarmRequest {
            action: action.into(),
            member_id: here,
            alarm: AlarmType::Nospace.into(),
        };
        rig.maintenance().alarm(request).await.unwrap().into_inner().alarms
    };
    assert!(alarm(AlarmAction::Get).await.is_empty());
    assert_eq!(alarm(AlarmAction::Activate).await.len(), 1);
    refused(
        rig.kv().put(put_request("k", "v", 0)).await,
        Code::ResourceExhausted,
        "etcdserver: mvcc: database space exceeded",
    );
    let status = rig.maintenance().status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.errors.len(), 1, "{:?}", status.errors);
    alarm(AlarmAction::Deactivate).await;
    assert!(alarm(AlarmAction::Get).await.is_empty());
    rig.put("k", "v").await;
}

#[tokio::test]
async fn defragment_answers_without_a_header() {
    let rig = start().await;
    let response = rig.maintenance().defragment(DefragmentRequest {}).await.unwrap().into_inner();
    assert!(response.header.is_none());
}
