use super::*;

fn ids(urls: &[&str]) -> Vec<u64> {
    urls.iter().map(|url| member_id(&[(*url).to_owned()], "etcd-cluster")).collect()
}

fn url(number: u64) -> Vec<String> {
    vec![format!("http://127.0.0.1:{number}")]
}

fn record(id: u64, port: u64, is_learner: bool) -> MemberRecord {
    MemberRecord { id, peer_urls: url(port), is_learner, ..MemberRecord::default() }
}

/// A cluster of the members 1, 2 and 3, at ports of these numbers.
fn three() -> Members {
    let records = (1..=3).map(|id| record(id, id, false)).collect();
    Members::restore(9, records, Vec::new())
}

/// Ids that real etcd gives.
#[test]
fn ids_are_those_of_etcd() {
    let alone = ids(&["http://localhost:2380"]);
    assert_eq!(alone, [0x8e9e05c52164694d]);
    assert_eq!(cluster_id(&alone), 0xcdf818194e3a8c32);

    let three = ids(&["http://127.0.0.1:2380", "http://127.0.0.1:22380", "http://127.0.0.1:32380"]);
    assert_eq!(three, [0xb71f75320dc06a6c, 0x9e737febb6b99eee, 0x0628170c800dbcee]);
    assert_eq!(cluster_id(&three), 0x066d3a070bf89b39);
}

#[test]
fn a_member_is_reached_where_it_said() {
    let url = vec!["http://localhost:2380".to_owned()];
    let mut members = Members::bootstrap(&[("default".to_owned(), url)], "etcd-cluster");
    let id = members.list()[0].id;
    members.publish(id, "other".to_owned(), vec!["http://localhost:2379".to_owned()]);
    members.publish(1, "nobody".to_owned(), vec![]);
    let list = members.list();
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].name, "other");
    assert_eq!(list[0].client_ur_ls, ["http://localhost:2379"]);
}

#[test]
fn the_order_of_urls_in_the_flags_is_of_no_matter() {
    let urls = |order: [&str; 2]| {
        let urls = order.iter().map(|url| (*url).to_owned()).collect();
        Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster")
    };
    assert_eq!(urls(["http://a:1", "http://b:1"]), urls(["http://b:1", "http://a:1"]));
}

#[test]
fn an_id_is_used_once_and_a_peer_url_by_one() {
    let mut members = three();
    for taken in [NOBODY, 1] {
        let refused = members.change(Change::Add(record(taken, 4, false)));
        assert_eq!(refused, Err(Error::MemberExists));
    }
    let used = Change::Add(MemberRecord {
        peer_urls: vec!["http://127.0.0.1:4".to_owned(), "http://127.0.0.1:3".to_owned()],
        ..record(4, 0, true)
    });
    assert_eq!(members.change(used), Err(Error::PeerUrlExists));
    assert_eq!(members.change(Change::Add(record(4, 4, true))), Ok(()));
    assert_eq!(members.voters_and_learners(), (vec![1, 2, 3], vec![4]));

    assert_eq!(members.change(Change::Remove(4)), Ok(()));
    assert!(members.is_removed(4) && members.get(4).is_none());
    assert_eq!(members.change(Change::Add(record(4, 5, false))), Err(Error::MemberExists));
    // What the id has lost for ever, the URL has not.
    assert_eq!(members.change(Change::Add(record(5, 4, false))), Ok(()));
}

#[test]
fn a_member_that_left_is_unknown() {
    let mut members = three();
    assert_eq!(members.change(Change::Remove(3)), Ok(()));
    for gone in [3, 7] {
        for change in
            [Change::Remove(gone), Change::Promote(gone), Change::Update(record(gone, 7, false))]
        {
            assert_eq!(members.change(change), Err(Error::MemberNotFound));
        }
    }
}

#[test]
fn the_last_voter_stays() {
    let mut members = three();
    members.change(Change::Add(record(4, 4, true))).expect("added");
    members.change(Change::Remove(1)).expect("two are left");
    members.change(Change::Remove(2)).expect("one is left");
    assert_eq!(members.change(Change::Remove(3)), Err(Error::NotEnoughStartedMembers));
    members.change(Change::Promote(4)).expect("a learner");
    members.change(Change::Remove(3)).expect("there is another voter");
    assert_eq!(members.change(Change::Remove(4)), Err(Error::NotEnoughStartedMembers));
}

#[test]
fn a_learner_is_promoted_once() {
    let mut members = three();
    members.change(Change::Add(record(4, 4, true))).expect("added");
    assert_eq!(members.change(Change::Promote(4)), Ok(()));
    assert_eq!(members.change(Change::Promote(4)), Err(Error::MemberNotLearner));
    assert_eq!(members.voters_and_learners(), (vec![1, 2, 3, 4], vec![]));
}

/// etcd 3.6 before 3.6.12 made a voter of a learner whose URLs were updated.
#[test]
fn an_update_changes_peer_urls_alone() {
    let mut members = three();
    members.change(Change::Add(record(4, 4, true))).expect("added");
    members.publish(4, "four".to_owned(), vec!["http://localhost:2379".to_owned()]);
    let before = members.get(4).expect("known").clone();
    assert_eq!(members.change(Change::Update(record(4, 3, false))), Err(Error::PeerUrlExists));
    assert_eq!(members.get(4), Some(&before));
    for port in [44, 44] {
        assert_eq!(members.change(Change::Update(record(4, port, false))), Ok(()));
    }
    assert_eq!(members.get(4), Some(&MemberRecord { peer_urls: url(44), ..before }));
}

/// SplitMix64: the same numbers for the same seed, everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// A change with ids and ports that are often taken.
    fn change(&mut self) -> Change {
        let id = self.below(12);
        let member = record(id, self.below(12), self.below(2) == 0);
        match self.below(5) {
            0 => Change::Remove(id),
            1 => Change::Promote(id),
            2 => Change::Update(member),
            _ => Change::Add(member),
        }
    }
}

/// What the module promises to be always true.
fn assert_promises(members: &Members, before: &Members) {
    assert!(members.voters().count() > 0, "no voter is left");
    let records = members.records();
    assert!(records.iter().all(|member| !members.is_removed(member.id)));
    assert!(before.removed().iter().all(|id| members.is_removed(*id)), "one came back");
    let urls: Vec<&String> = records.iter().flat_map(|member| &member.peer_urls).collect();
    let distinct: BTreeSet<&String> = urls.iter().copied().collect();
    assert_eq!(distinct.len(), urls.len(), "two have one URL");
}

#[test]
fn any_changes_keep_the_promises_and_survive_a_checkpoint() {
    for seed in 0..200 {
        let mut random = Random(seed);
        let mut members = three();
        let mut carried_out = 0;
        for _ in 0..60 {
            let before = members.clone();
            let change = random.change();
            match members.change(change.clone()) {
                Ok(()) => carried_out += 1,
                Err(_) => assert_eq!(members, before, "seed {seed}: {change:?}"),
            }
            assert_promises(&members, &before);
            let restored =
                Members::restore(members.cluster_id(), members.records(), members.removed());
            assert_eq!(restored, members, "seed {seed}: {change:?}");
        }
        assert!(carried_out > 3, "seed {seed}");
    }
}
