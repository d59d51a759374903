//! Members, leadership, hashes, alarms: the Cluster and Maintenance services.

use kvorum::pb::etcdserverpb::alarm_request::AlarmAction;
use kvorum::pb::etcdserverpb::downgrade_request::DowngradeAction;
use kvorum::pb::etcdserverpb::{
    AlarmRequest, AlarmType, DefragmentRequest, DowngradeRequest, DowngradeResponse, HashKvRequest,
    MemberAddRequest, MemberListRequest, MemberPromoteRequest, MemberRemoveRequest,
    MemberUpdateRequest, MoveLeaderRequest, SnapshotRequest, StatusRequest,
};
use tonic::{Code, Status};

use crate::rig::{Rig, put_request, refused, start};

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

#[tokio::test]
async fn changes_of_members_are_refused_in_etcds_words_first() {
    let rig = start().await;
    let member = only_member(&rig).await;
    let new = vec!["http://127.0.0.1:1".to_owned()];
    let add = |peer_ur_ls: Vec<String>| {
        let mut members = rig.members();
        let request = MemberAddRequest { peer_ur_ls, is_learner: false };
        async move { members.member_add(request).await }
    };
    let bad = "etcdserver: given member URLs are invalid";
    refused(add(Vec::new()).await, Code::InvalidArgument, bad);
    refused(add(vec!["nonsense".to_owned()]).await, Code::InvalidArgument, bad);
    assert_eq!(add(new.clone()).await.unwrap_err().code(), Code::Unimplemented);

    let gone = "etcdserver: member not found";
    let id = member.id ^ 1;
    refused(rig.members().member_remove(MemberRemoveRequest { id }).await, Code::NotFound, gone);
    let update = MemberUpdateRequest { id, peer_ur_ls: new };
    refused(rig.members().member_update(update).await, Code::NotFound, gone);
    refused(rig.members().member_promote(MemberPromoteRequest { id }).await, Code::NotFound, gone);
    refused(
        rig.members().member_promote(MemberPromoteRequest { id: member.id }).await,
        Code::FailedPrecondition,
        "etcdserver: can only promote a learner member",
    );
    let remove = MemberRemoveRequest { id: member.id };
    let refusal = rig.members().member_remove(remove).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unimplemented);
    assert!(refusal.message().contains("one member"), "{refusal:?}");
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
async fn defragment_answers_without_a_header_and_snapshots_are_to_come() {
    let rig = start().await;
    let response = rig.maintenance().defragment(DefragmentRequest {}).await.unwrap().into_inner();
    assert!(response.header.is_none());
    let refusal = rig.maintenance().snapshot(SnapshotRequest {}).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unimplemented);
}
