use bytes::Bytes;
use raft::eraftpb::EntryType;

use super::*;

const RESUME_TICKS: u64 = 40;

/// An entry of the log that holds a command.
fn command_entry(index: u64, term: u64, data: Bytes) -> Entry {
    Entry { index, term, kind: EntryType::EntryNormal as u8, data, context: Bytes::new() }
}

fn context(number: u64) -> [u8; 24] {
    let mut context = [0; 24];
    context[16..].copy_from_slice(&number.to_be_bytes());
    context
}

fn lone(hard_state: HardState, start: Mark, entries: Vec<Entry>, applied: u64) -> Node {
    Node::new(Start {
        id: 7,
        election_ticks: 10,
        catch_up_entries: 5,
        resume_ticks: RESUME_TICKS,
        pre_vote: true,
        seed: 0,
        hard_state,
        start,
        entries,
        applied,
        configuration: Configuration { voters: vec![7], learners: vec![] },
    })
    .expect("the parts agree")
}

fn empty() -> Node {
    lone(HardState::default(), Mark::default(), vec![], 0)
}

/// Carries out effects until there are none; returns what was committed.
fn settle(node: &mut Node) -> Vec<Entry> {
    let mut committed = Vec::new();
    while let Some(effects) = node.effects().expect("effects") {
        if let Some(append) = effects.append {
            node.persisted(append.number);
        }
        if let Some(last) = effects.committed.last() {
            node.applied(last.index);
        }
        committed.extend(effects.committed);
    }
    committed
}

fn lead(node: &mut Node) {
    node.campaign().expect("campaign");
    settle(node);
    assert!(node.role.is_leader);
}

#[test]
fn a_lone_voter_leads_at_once_and_commits_what_it_persisted() {
    let mut node = empty();
    assert!(node.is_only_voter());
    lead(&mut node);
    node.propose(Bytes::from_static(b"one")).expect("leader");
    node.propose(Bytes::from_static(b"two")).expect("leader");
    let committed = settle(&mut node);
    let data: Vec<_> = committed.iter().map(|entry| &entry.data[..]).collect();
    assert_eq!(data, [b"one", b"two"]);
    assert!(committed.iter().all(|entry| command(entry).is_some()));
}

/// etcd #14370: a single member acknowledged before its fsync.
#[test]
fn nothing_is_committed_before_it_is_persisted() {
    let mut node = empty();
    lead(&mut node);
    node.propose(Bytes::from_static(b"one")).expect("leader");
    let effects = node.effects().expect("effects").expect("an append");
    let first = effects.append.expect("an append").number;
    assert!(effects.committed.is_empty());

    // A second write is handed out while the first is on its way to the disk.
    node.propose(Bytes::from_static(b"two")).expect("leader");
    let effects = node.effects().expect("effects").expect("an append");
    let second = effects.append.expect("an append");
    assert_eq!(second.entries.len(), 1, "only what is new");
    assert!(effects.committed.is_empty());
    assert!(node.effects().expect("effects").is_none());

    node.persisted(first);
    let effects = node.effects().expect("effects").expect("the first is committed");
    assert_eq!(effects.committed.len(), 1);
    node.persisted(second.number);
    let effects = node.effects().expect("effects").expect("the second is committed");
    assert_eq!(effects.committed.len(), 1);
}

#[test]
fn a_proposal_needs_a_leader() {
    let mut node = empty();
    assert_eq!(node.propose(Bytes::from_static(b"one")), Err(Refused::NotLeader));
}

#[test]
fn a_read_index_is_the_commit_index_of_the_leader() {
    let mut node = empty();
    assert!(!node.read_index(context(1)), "without a leader it is dropped");
    lead(&mut node);
    node.propose(Bytes::from_static(b"one")).expect("leader");
    let last = settle(&mut node).last().expect("committed").index;
    assert!(node.read_index(context(2)));
    let effects = node.effects().expect("effects").expect("a read");
    assert_eq!(effects.reads, [ReadReady { context: context(2), index: last }]);
    assert!(effects.append.is_none());
}

/// Reads without writes must not pile up records of effects inside raft.
#[test]
fn effects_without_a_write_are_forgotten() {
    let mut node = empty();
    lead(&mut node);
    for number in 10..1000 {
        assert!(node.read_index(context(number)));
        settle(&mut node);
    }
    node.propose(Bytes::from_static(b"one")).expect("leader");
    assert_eq!(settle(&mut node).len(), 1);
}

#[test]
fn a_restarted_node_applies_what_the_checkpoint_lacks() {
    let entries: Vec<_> =
        (4..=6).map(|index| command_entry(index, 2, Bytes::from(vec![index as u8]))).collect();
    // The commit index on disk lags what is applied: it is raised.
    let hard_state = HardState { term: 2, vote: 7, commit: 3 };
    let mut node = lone(hard_state, Mark { index: 3, term: 2 }, entries, 5);
    node.campaign().expect("campaign");
    let committed = settle(&mut node);
    let indexes: Vec<_> =
        committed.iter().map(|entry| (entry.index, command(entry).is_some())).collect();
    assert_eq!(indexes, [(6, true), (7, false)], "entry 7 is the new term's first");
    assert_eq!(node.role.term, 3);
}

#[test]
fn a_log_that_lost_its_end_is_refused() {
    let start = Start {
        id: 7,
        election_ticks: 10,
        catch_up_entries: 5,
        resume_ticks: RESUME_TICKS,
        pre_vote: true,
        seed: 0,
        hard_state: HardState { term: 2, vote: 7, commit: 9 },
        start: Mark { index: 3, term: 2 },
        entries: vec![],
        applied: 3,
        configuration: Configuration { voters: vec![7], learners: vec![] },
    };
    assert!(Node::new(start).is_err());
}

#[test]
fn of_applied_entries_the_last_ones_are_kept() {
    let mut node = empty();
    lead(&mut node);
    for value in 0..20u8 {
        node.propose(vec![value].into()).expect("leader");
    }
    let last = settle(&mut node).last().expect("committed").index;
    let term_of = |node: &Node, index| raft::Storage::term(node.raw.store(), index).ok();
    assert_eq!(term_of(&node, last - 6), None);
    assert_eq!(term_of(&node, last - 5), Some(1), "the term at the cut is known");
    assert_eq!(term_of(&node, last), Some(1));
    node.propose(Bytes::from_static(b"more")).expect("leader");
    assert_eq!(settle(&mut node).len(), 1);
}

#[test]
fn applied_entries_are_kept_up_to_a_size() {
    let mut node = empty();
    lead(&mut node);
    for _ in 0..6 {
        node.propose(vec![0; 1023 * 1024].into()).expect("leader");
        settle(&mut node);
    }
    let first = raft::Storage::first_index(node.raw.store()).expect("a first index");
    let last = raft::Storage::last_index(node.raw.store()).expect("a last index");
    assert_eq!(last + 1 - first, 4, "4 MiB");
}

/// Cluster members, and what they have sent and not yet heard.
struct Cluster {
    nodes: BTreeMap<u64, Node>,
    wire: VecDeque<(u64, Outgoing)>,
    /// Writes that the disk of a member has yet to finish, when it is slow.
    unfinished: BTreeMap<u64, Vec<u64>>,
    /// What the disks that are not slow have of the newest commit index.
    written_commit: BTreeMap<u64, u64>,
    slow: Vec<u64>,
    cut_off: Vec<u64>,
    /// What would carry an image is lost.
    loses_images: bool,
    committed: BTreeMap<u64, Vec<Entry>>,
    installs: Vec<(u64, Install)>,
    wanted: Vec<u64>,
    reads: Vec<(u64, ReadReady)>,
}

const BEGIN: Mark = Mark { index: 1, term: 1 };

/// A member of a cluster that has just begun.
fn begun(id: u64, configuration: Configuration) -> Node {
    Node::new(of_a_new_cluster(id, configuration)).unwrap()
}

fn of_a_new_cluster(id: u64, configuration: Configuration) -> Start {
    Start {
        id,
        election_ticks: 10,
        catch_up_entries: 5,
        resume_ticks: RESUME_TICKS,
        pre_vote: true,
        seed: 7,
        hard_state: HardState { term: 1, vote: 0, commit: 1 },
        start: BEGIN,
        entries: vec![],
        applied: 1,
        configuration,
    }
}

impl Cluster {
    fn new() -> Cluster {
        let configuration = Configuration { voters: vec![1, 2, 3], learners: vec![] };
        Cluster::of([1, 2, 3].map(|id| of_a_new_cluster(id, configuration.clone())))
    }

    fn of(starts: impl IntoIterator<Item = Start>) -> Cluster {
        let nodes = starts.into_iter().map(|start| (start.id, Node::new(start).unwrap()));
        Cluster {
            nodes: nodes.collect(),
            wire: VecDeque::new(),
            unfinished: BTreeMap::new(),
            written_commit: BTreeMap::new(),
            slow: vec![],
            cut_off: vec![],
            loses_images: false,
            committed: BTreeMap::new(),
            installs: vec![],
            wanted: vec![],
            reads: vec![],
        }
    }

    fn node(&mut self, id: u64) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    /// Carries everything out until nothing is left to do.
    fn settle(&mut self) {
        loop {
            let mut quiet = true;
            for (id, node) in &mut self.nodes {
                while let Some(effects) = node.effects().unwrap() {
                    quiet = false;
                    self.wire.extend(effects.messages.into_iter().map(|message| (*id, message)));
                    self.wanted.extend(effects.snapshots_wanted);
                    self.installs.extend(effects.install.map(|install| (*id, install)));
                    self.reads.extend(effects.reads.into_iter().map(|read| (*id, read)));
                    if let Some(append) = effects.append {
                        if self.slow.contains(id) {
                            self.unfinished.entry(*id).or_default().push(append.number);
                        } else {
                            let commit = append.hard_state.map(|hard_state| hard_state.commit);
                            self.written_commit.extend(commit.map(|commit| (*id, commit)));
                            node.persisted(append.number);
                        }
                    }
                    for entry in &effects.committed {
                        if is_change(entry) {
                            node.change_applied(entry.index, true).unwrap();
                        }
                    }
                    if let Some(last) = effects.committed.last() {
                        node.applied(last.index);
                    }
                    self.committed.entry(*id).or_default().extend(effects.committed);
                }
            }
            while let Some((from, message)) = self.wire.pop_front() {
                quiet = false;
                let is_cut_off = [from, message.to].iter().any(|id| self.cut_off.contains(id));
                if let Some(node) = self.nodes.get_mut(&message.to).filter(|_| !is_cut_off) {
                    match message.kind {
                        Kind::Snapshot(_) if self.loses_images => {}
                        Kind::Snapshot(_) => drop(node.step_snapshot(&message.bytes).unwrap()),
                        _ => node.step(&message.bytes).unwrap(),
                    }
                }
            }
            if quiet {
                return;
            }
        }
    }

    /// A tick of each, one after the other, as between clocks that began at different times.
    fn tick(&mut self) {
        let ids: Vec<u64> = self.nodes.keys().copied().collect();
        for id in ids {
            self.node(id).tick();
            self.settle();
        }
    }

    /// Lets time pass until somebody leads in a later term than any before.
    fn elect(&mut self) -> u64 {
        let before = self.nodes.values().map(|node| node.role.term).max().unwrap();
        for _ in 0..100 {
            self.tick();
            let leader =
                self.nodes.iter().find(|(_, node)| node.role.is_leader && node.role.term > before);
            if let Some((id, _)) = leader {
                return *id;
            }
        }
        panic!("nobody was elected");
    }
}

#[test]
fn three_elect_one_and_commit_what_it_proposes() {
    let mut three = Cluster::new();
    let leader = three.elect();
    three.node(leader).propose(Bytes::from_static(b"one")).unwrap();
    three.settle();
    three.tick();
    for (id, committed) in &three.committed {
        let last = committed.last().unwrap();
        assert_eq!(command(last), Some(&Bytes::from_static(b"one")), "member {id}");
    }
}

#[test]
fn the_same_seed_elects_the_same_leader() {
    let first: Vec<u64> = (0..5).map(|_| Cluster::new().elect()).collect();
    assert!(first.windows(2).all(|two| two[0] == two[1]), "{first:?}");
}

/// Before a leader has committed in its own term it does not know what earlier leaders
/// committed, and a read at its commit index could miss that.
#[test]
fn a_new_leader_answers_no_read_before_it_has_committed_in_its_term() {
    let mut node = empty();
    let mut unfinished = Vec::new();
    for _ in 0..100 {
        node.tick();
        while let Some(effects) = node.effects().expect("effects") {
            unfinished.extend(effects.append.map(|append| append.number));
        }
    }
    assert!(node.role.is_leader, "and what it wrote is not on disk yet");
    node.read_index(context(1));
    let early = node.effects().expect("effects");
    assert!(early.is_none_or(|effects| effects.reads.is_empty()));
    unfinished.into_iter().for_each(|number| node.persisted(number));
    let last = settle(&mut node).last().expect("committed").index;
    assert!(node.read_index(context(2)));
    let effects = node.effects().expect("effects").expect("a read");
    assert_eq!(effects.reads, [ReadReady { context: context(2), index: last }]);
}

/// With pre-vote a member does not learn of a later term by being asked for its vote; the
/// others must learn from its answer all the same.
#[test]
fn a_member_of_an_old_term_still_makes_a_majority() {
    let mut three = Cluster::new();
    let first = three.elect();
    let behind = 1 + first % 3;
    let other = 6 - first - behind;
    three.cut_off = vec![behind];
    for (from, to) in [(first, other), (other, first), (first, other)] {
        three.node(from).transfer_leader(to);
        three.settle();
        assert!(three.node(to).role.is_leader);
    }
    assert!(three.node(behind).term() < three.node(first).term());
    three.cut_off = vec![other];
    assert_eq!(three.elect(), first, "only its log has everything");
}

#[test]
fn a_member_that_was_cut_off_comes_back_without_an_election() {
    let mut three = Cluster::new();
    let leader = three.elect();
    let term = three.node(leader).term();
    three.cut_off = vec![1 + leader % 3];
    for _ in 0..100 {
        three.tick();
    }
    three.cut_off.clear();
    for _ in 0..100 {
        three.tick();
    }
    assert!(three.node(leader).role.is_leader);
    assert!(three.nodes.values().all(|node| node.term() == term));
}

/// One of two voters never heard of the other, and campaigns by itself, in terms that the
/// other does not hear of. Only the other can win; asking for votes in terms that have passed,
/// it has to be told.
#[test]
fn who_asks_for_votes_in_a_term_that_has_passed_is_told_the_term() {
    let voters = |voters: [u64; 2]| Configuration { voters: voters.to_vec(), learners: vec![] };
    let start = |id, term, entries, known| Start {
        pre_vote: false,
        hard_state: HardState { term, vote: 0, commit: 1 },
        entries,
        ..of_a_new_cluster(id, voters(known))
    };
    let entry = command_entry(2, 5, Bytes::from_static(b"one"));
    let behind = start(1, 90, vec![], [1, 3]);
    let ahead = start(2, 5, vec![entry], [1, 2]);
    let mut two = Cluster::of([behind, ahead]);
    assert_eq!(two.elect(), 2);
    assert!(two.node(2).term() > 90);
}

/// The leader they knew would keep them from hearing each other, if they clung to it.
#[test]
fn two_that_campaign_at_the_same_time_elect_one() {
    let mut three = Cluster::new();
    let leader = three.elect();
    let term = three.node(leader).term();
    let left: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    three.cut_off = vec![leader];
    for _ in 0..200 {
        for id in &left {
            three.node(*id).tick();
        }
        three.settle();
    }
    let leads = |id: &&u64| three.nodes[*id].role.is_leader && three.nodes[*id].role.term > term;
    assert_eq!(left.iter().filter(leads).count(), 1);
}

/// A vote that was given and forgotten could be given twice.
#[test]
fn a_vote_leaves_only_when_it_is_on_disk() {
    let mut three = Cluster::new();
    three.slow = vec![1, 2, 3];
    for _ in 0..40 {
        three.tick();
    }
    assert!(three.nodes.values().all(|node| !node.role.is_leader), "nobody's vote is on disk");
    three.slow.clear();
    for (id, numbers) in std::mem::take(&mut three.unfinished) {
        three.node(id).persisted(*numbers.last().unwrap());
    }
    for _ in 0..40 {
        three.tick();
    }
    assert!(three.nodes.values().any(|node| node.role.is_leader));
}

/// It leads at once, and a learner would listen: after a crash it may lead in that term again.
#[test]
fn a_lone_voter_says_nothing_in_a_term_that_is_not_on_disk() {
    let mut node = begun(1, Configuration { voters: vec![1], learners: vec![2] });
    node.campaign().unwrap();
    let (mut writes, mut said) = (Vec::new(), Vec::new());
    for turn in 0..3 {
        if turn > 0 {
            node.tick();
            node.propose(Bytes::from_static(b"entry")).unwrap();
        }
        while let Some(effects) = node.effects().unwrap() {
            writes.extend(effects.append.map(|append| append.number));
            said.extend(effects.messages);
        }
    }
    assert!(node.role.is_leader && writes.len() > 1, "{writes:?}");
    assert_eq!(said, []);
    for number in writes {
        node.persisted(number);
    }
    let effects = node.effects().unwrap().unwrap();
    assert!(!effects.messages.is_empty(), "the learner hears of it now");
}

#[test]
fn the_leaders_own_disk_does_not_hold_up_a_majority() {
    let mut three = Cluster::new();
    let leader = three.elect();
    three.slow = vec![leader];
    three.node(leader).propose(Bytes::from_static(b"one")).unwrap();
    three.settle();
    three.tick();
    for follower in (1..=3).filter(|id| *id != leader) {
        let committed = three.committed[&follower].last().unwrap();
        assert_eq!(command(committed), Some(&Bytes::from_static(b"one")));
    }
    let here = three.committed[&leader].last().unwrap();
    assert_eq!(command(here), None, "what is not on its own disk it does not apply");
}

#[test]
fn a_follower_reads_at_an_index_that_the_leader_has_confirmed() {
    let mut three = Cluster::new();
    let leader = three.elect();
    let follower = 1 + leader % 3;
    assert!(three.node(follower).read_index(context(9)));
    three.settle();
    let index = three.node(leader).committed();
    assert_eq!(three.reads, [(follower, ReadReady { context: context(9), index })]);

    three.cut_off = vec![leader];
    three.reads.clear();
    assert!(three.node(leader).read_index(context(10)));
    three.settle();
    assert!(three.reads.is_empty(), "nobody has confirmed that it leads");
}

#[test]
fn a_follower_that_sees_its_leader_go_does_not_wait_for_the_whole_timeout() {
    let mut three = Cluster::new();
    let leader = three.elect();
    three.cut_off = vec![leader];
    for id in (1..=3).filter(|id| *id != leader) {
        three.node(id).lost_sight_of(leader);
    }
    for _ in 0..5 {
        three.tick();
    }
    let new = three.nodes.iter().find(|(id, node)| **id != leader && node.role.is_leader);
    assert!(new.is_some(), "one of the two that saw it leads");
}

#[test]
fn a_member_that_is_far_behind_is_sent_a_snapshot_that_was_offered() {
    let mut three = Cluster::new();
    let leader = three.elect();
    let behind = 1 + leader % 3;
    three.cut_off = vec![behind];
    for value in 0..20u8 {
        three.node(leader).propose(vec![value].into()).unwrap();
        three.settle();
    }
    three.cut_off.clear();
    for _ in 0..3 {
        three.tick();
    }
    assert!(three.wanted.contains(&behind));
    let mark = Mark { index: three.node(leader).committed(), term: three.node(leader).term() };
    let configuration = Configuration { voters: vec![1, 2, 3], learners: vec![] };
    three.node(leader).offer_snapshot(behind, mark, &configuration);
    for _ in 0..3 {
        three.tick();
    }
    let (id, install) = three.installs.pop().unwrap();
    assert_eq!((id, install.mark), (behind, mark));

    // Nothing but messages comes out until it is in force.
    three.node(leader).report_snapshot(behind, true);
    three.node(leader).propose(Bytes::from_static(b"more")).unwrap();
    three.settle();
    assert!(three.committed.get(&behind).unwrap().iter().all(|entry| entry.index < mark.index));
    three.node(behind).persisted(install.number);
    three.node(behind).applied(mark.index);
    for _ in 0..3 {
        three.tick();
    }
    let last = three.committed[&behind].last().unwrap();
    assert_eq!(command(last), Some(&Bytes::from_static(b"more")));
}

/// Three of which one is behind the log that the leader holds.
struct OneBehind {
    three: Cluster,
    leader: u64,
    behind: u64,
    /// Up to where the image goes that it is offered.
    mark: Mark,
}

impl OneBehind {
    fn new() -> OneBehind {
        let mut three = Cluster::new();
        let leader = three.elect();
        let behind = 1 + leader % 3;
        let mut all = OneBehind { three, leader, behind, mark: Mark::default() };
        all.three.cut_off = vec![behind];
        all.write(20);
        all.three.cut_off.clear();
        let leader = all.leader();
        let (index, term) = (leader.committed(), leader.term());
        all.mark = Mark { index, term };
        all
    }

    fn leader(&mut self) -> &mut Node {
        self.three.node(self.leader)
    }

    /// Twenty of these are more than a message carries, and than the log keeps.
    fn write(&mut self, times: usize) {
        for _ in 0..times {
            self.leader().propose(vec![0; 100 * 1024].into()).unwrap();
            self.three.settle();
        }
    }

    /// Raft asks for an image, is offered the one as of `mark`, and sends it.
    fn send_image(&mut self) {
        self.three.wanted.clear();
        self.three.tick();
        assert!(self.three.wanted.contains(&self.behind));
        self.three.wanted.clear();
        let configuration = Configuration { voters: vec![1, 2, 3], learners: vec![] };
        let (behind, mark) = (self.behind, self.mark);
        self.leader().offer_snapshot(behind, mark, &configuration);
        self.three.tick();
    }

    /// The image that arrived is in force; nobody has heard of it yet.
    fn put_in_force(&mut self) {
        let (id, install) = self.three.installs.pop().unwrap();
        assert_eq!((id, install.mark), (self.behind, self.mark), "nothing newer is needed");
        let (behind, index) = (self.behind, self.mark.index);
        self.three.node(behind).persisted(install.number);
        self.three.node(behind).applied(index);
    }

    /// The leader hears what the member has to say, and nothing that it says then arrives.
    fn hear(&mut self) {
        let (behind, leader) = (self.behind, self.leader);
        while let Some(effects) = self.three.node(behind).effects().unwrap() {
            for message in effects.messages.iter().filter(|message| message.to == leader) {
                self.leader().step(&message.bytes).unwrap();
            }
        }
        self.three.cut_off = vec![behind];
    }

    fn report(&mut self, is_in_force: bool) {
        let behind = self.behind;
        self.leader().report_snapshot(behind, is_in_force);
    }

    /// Everybody hears everybody again: it needs no other image.
    #[track_caller]
    fn assert_catches_up(&mut self) {
        self.three.cut_off.clear();
        self.three.tick();
        self.three.tick();
        assert!(self.three.wanted.is_empty(), "a second image");
        let last = self.three.committed[&self.behind].last().unwrap().index;
        assert_eq!(last, self.leader().committed());
    }

    /// The log is kept behind the image for so many ticks more, and then forgotten.
    #[track_caller]
    fn assert_is_waited_for(&mut self, ticks: u64) {
        for _ in 0..ticks {
            self.three.tick();
        }
        self.write(1);
        let begins = self.mark.index;
        assert_eq!(self.leader().log_start(), begins, "as long as it is waited for");
        self.three.tick();
        self.write(1);
        let last = self.leader().committed();
        assert_eq!(self.leader().log_start(), last - 5, "and not longer");
    }
}

#[test]
fn the_log_behind_an_image_is_kept_until_the_member_has_it() {
    let mut all = OneBehind::new();
    all.send_image();
    all.write(20);
    all.put_in_force();
    // That it is in force is known before the member says anything.
    all.three.cut_off = vec![all.behind];
    all.report(true);
    all.write(20);
    all.assert_catches_up();
    all.write(20);
    let last = all.leader().committed();
    assert_eq!(all.leader().log_start(), last - 5, "it has it");
}

/// It says so a little before whoever sent the image hears it, or where that never hears it.
#[test]
fn the_log_behind_an_image_is_kept_for_a_member_that_has_acknowledged_it() {
    for is_reported in [true, false] {
        let mut all = OneBehind::new();
        all.send_image();
        all.write(20);
        all.put_in_force();
        all.hear();
        all.write(20);
        all.report(is_reported);
        all.write(20);
        all.assert_catches_up();
    }
}

#[test]
fn who_has_an_image_and_says_nothing_is_not_waited_for() {
    let mut all = OneBehind::new();
    all.send_image();
    all.put_in_force();
    all.three.cut_off = vec![all.behind];
    all.report(true);
    for _ in 0..7 {
        all.three.tick();
    }
    let answer = heartbeat_response(all.behind, all.leader, all.mark.term);
    all.leader().step(&answer).unwrap();
    all.write(20);
    all.assert_is_waited_for(10);
}

#[test]
fn an_interrupted_image_goes_on_although_the_log_does() {
    let mut all = OneBehind::new();
    all.three.loses_images = true;
    all.send_image();
    all.write(20);
    all.report(false);
    all.write(20);
    all.three.loses_images = false;
    all.send_image();
    all.put_in_force();
    all.report(true);
    all.assert_catches_up();
}

#[test]
fn the_log_behind_an_interrupted_image_is_kept_while_it_may_go_on() {
    let mut all = OneBehind::new();
    all.three.loses_images = true;
    all.send_image();
    all.report(false);
    all.three.cut_off = vec![all.behind];
    all.write(20);
    all.assert_is_waited_for(RESUME_TICKS);
}

fn heartbeat_response(from: u64, to: u64, term: u64) -> Vec<u8> {
    let answer = eraftpb::Message {
        msg_type: MessageType::MsgHeartbeatResponse,
        from,
        to,
        term,
        ..eraftpb::Message::default()
    };
    answer.write_to_bytes().unwrap()
}

/// It was deaf for a while, and answers all heartbeats at once.
#[test]
fn each_answer_of_a_member_that_is_probed_is_not_a_reason_to_send_it_everything() {
    const MIB: usize = 1024 * 1024;
    const ENTRY: usize = 64 * 1024;
    let configuration = Configuration { voters: vec![1, 2, 3], learners: vec![] };
    let mut three =
        Cluster::of([1, 2, 3].map(|id| Start {
            catch_up_entries: 100,
            ..of_a_new_cluster(id, configuration.clone())
        }));
    let leader = three.elect();
    let behind = 1 + leader % 3;
    three.cut_off = vec![behind];
    for _ in 0..80 {
        three.node(leader).propose(vec![0; ENTRY].into()).unwrap();
    }
    three.node(leader).report_unreachable(behind);
    three.settle();
    let term = three.node(leader).term();
    let answer = heartbeat_response(behind, leader, term);
    for _ in 0..3 {
        three.node(leader).tick();
        for _ in 0..100 {
            three.node(leader).step(&answer).unwrap();
        }
    }
    let sent = three.node(leader).effects().unwrap().unwrap().messages;
    let bytes: usize = sent.iter().map(|message| message.bytes.len()).sum();
    assert!(bytes >= 2 * ENTRY, "it is probed all the same");
    assert!(bytes < MIB, "{bytes} bytes");
    three.cut_off.clear();
    three.tick();
    three.tick();
    let last = three.committed[&behind].last().unwrap().index;
    assert_eq!(last, three.node(leader).committed());
}

/// Raft's message for a snapshot of everything up to `mark`.
fn snapshot(from: u64, to: u64, mark: Mark, voters: Vec<u64>) -> Vec<u8> {
    let mut snapshot = raft::eraftpb::Snapshot::default();
    snapshot.mut_metadata().index = mark.index;
    snapshot.mut_metadata().term = mark.term;
    snapshot.mut_metadata().mut_conf_state().voters = voters;
    let (msg_type, term) = (MessageType::MsgSnapshot, mark.term);
    let message = raft::eraftpb::Message { msg_type, from, to, term, ..Default::default() };
    let message = raft::eraftpb::Message { snapshot: Some(snapshot).into(), ..message };
    message.write_to_bytes().unwrap()
}

/// Its message would be the last that raft saw of the first one.
#[test]
fn while_a_snapshot_is_put_in_force_another_is_not_taken() {
    let mut three = Cluster::new();
    // The others have never had what the snapshots speak of.
    three.cut_off = vec![1];
    let first = snapshot(2, 1, Mark { index: 100, term: 5 }, vec![1, 2, 3]);
    let second = snapshot(2, 1, Mark { index: 200, term: 5 }, vec![1, 2, 3]);
    assert!(three.node(1).step(&first).is_err(), "it has no image");
    assert!(three.node(1).step_snapshot(&first).unwrap());
    three.settle();
    assert!(!three.node(1).step_snapshot(&second).unwrap());
    let (_, install) = three.installs.pop().unwrap();
    three.node(1).persisted(install.number);
    three.node(1).applied(100);
    three.settle();
    assert!(three.node(1).step_snapshot(&second).unwrap());
    three.settle();
    assert_eq!(three.installs.pop().unwrap().1.mark.index, 200);
}

#[test]
fn a_change_from_before_a_snapshot_does_not_change_the_snapshots_configuration() {
    let mut node = lone(HardState::default(), Mark::default(), vec![], 0);
    lead(&mut node);
    node.propose_change(Change::Listen(9), Bytes::from_static(b"hello")).unwrap();
    let mut change = None;
    while let Some(effects) = node.effects().unwrap() {
        if let Some(append) = effects.append {
            node.persisted(append.number);
        }
        change = effects.committed.iter().find(|entry| is_change(entry)).cloned().or(change);
    }
    let change = change.expect("it is committed").index;

    // Before it is applied the state of a leader arrives that has removed 9 again.
    let mark = Mark { index: 100, term: 5 };
    assert!(node.step_snapshot(&snapshot(8, 7, mark, vec![7, 8])).unwrap());
    let install = node.effects().unwrap().unwrap().install.unwrap();
    node.change_applied(change, true).unwrap();
    node.applied(change);
    node.persisted(install.number);
    node.applied(mark.index);
    let known: Vec<u64> = node.raw.raft.prs().iter().map(|(id, _)| *id).collect();
    assert!(known.iter().all(|id| [7, 8].contains(id)), "{known:?}");
}

#[test]
fn a_change_takes_effect_when_it_is_applied_and_one_at_a_time() {
    let mut three = Cluster::new();
    let leader = three.elect();
    let removed = 1 + leader % 3;
    let change = Change::Remove(removed);
    three.node(leader).propose_change(change, Bytes::from_static(b"bye")).unwrap();
    let busy = three.node(leader).propose_change(change, Bytes::from_static(b"bye"));
    assert_eq!(busy, Err(Refused::Busy));
    three.settle();
    let progress = three.node(leader).progress();
    assert_eq!(progress.len(), 2, "{progress:?}");
    let entry = three.committed[&leader].last().unwrap();
    assert_eq!(command(entry), Some(&Bytes::from_static(b"bye")));
}

/// Who is left of two must not ask the other, who may be gone, after a crash.
#[test]
fn that_a_change_is_committed_is_written() {
    let mut three = Cluster::new();
    let leader = three.elect();
    let change = Change::Remove(1 + leader % 3);
    let command = Bytes::from_static(b"entry");
    three.node(leader).propose(command.clone()).unwrap();
    three.settle();
    let entry = three.node(leader).committed();
    assert!(three.written_commit[&leader] < entry, "a commit index alone is not written");
    three.node(leader).propose_change(change, command).unwrap();
    three.settle();
    assert_eq!(three.node(leader).committed(), entry + 1);
    assert_eq!(three.written_commit[&leader], entry + 1);
}

#[test]
fn a_leader_that_is_removed_leads_no_more() {
    let mut three = Cluster::new();
    let proposes = three.elect();
    let removed = 1 + proposes % 3;
    // It becomes the leader while its removal is in the log and not committed.
    three.slow = (1..=3).filter(|id| *id != removed).collect();
    let bye = Bytes::from_static(b"bye");
    three.node(proposes).propose_change(Change::Remove(removed), bye.clone()).unwrap();
    three.node(proposes).transfer_leader(removed);
    three.settle();
    three.slow.clear();
    for (id, numbers) in std::mem::take(&mut three.unfinished) {
        numbers.into_iter().for_each(|number| three.node(id).persisted(number));
    }
    three.settle();
    assert!(three.committed[&removed].iter().any(|entry| command(entry) == Some(&bye)));

    let node = three.node(removed);
    assert!(node.role.term > 2, "it led: {:?}", node.role);
    assert!(!node.role.is_leader);
    assert_eq!(node.propose(bye), Err(Refused::NotLeader));
    assert!(!node.read_index(context(1)));
    assert_ne!(three.elect(), removed);
}

#[test]
fn what_no_member_would_say_is_passed_over() {
    use raft::eraftpb::{Entry as RaftEntry, Message};
    let mut three = Cluster::new();
    let leader = three.elect();
    let follower = 1 + leader % 3;
    let other = 6 - leader - follower;
    let term = three.node(leader).term();
    let last = three.node(leader).committed();
    let message = |kind: MessageType| Message {
        msg_type: kind,
        from: leader,
        to: follower,
        term,
        ..Message::default()
    };
    let entry = |index, term| RaftEntry { index, term, ..RaftEntry::default() };
    let gap = Message {
        index: last,
        log_term: term,
        entries: vec![entry(last + 2, term)].into(),
        ..message(MessageType::MsgAppend)
    };
    let future = Message {
        index: last,
        log_term: term,
        entries: vec![entry(last + 1, term + 1)].into(),
        ..message(MessageType::MsgAppend)
    };
    let bad = [
        message(MessageType::MsgHup),
        message(MessageType::MsgPropose),
        message(MessageType::MsgTransferLeader),
        message(MessageType::MsgReadIndex),
        message(MessageType::MsgSnapshot),
        Message { to: other, ..message(MessageType::MsgHeartbeat) },
        Message { from: follower, ..message(MessageType::MsgHeartbeat) },
        Message { term: 0, ..message(MessageType::MsgAppend) },
        Message { index: last + 9, ..message(MessageType::MsgAppendResponse) },
        gap,
        future,
    ];
    for message in bad {
        let bytes = message.write_to_bytes().unwrap();
        let malformed = three.node(follower).step(&bytes).unwrap_err();
        assert!(!malformed.is_fatal(), "{message:?}: {malformed}");
    }
    assert!(three.node(follower).step(b"nonsense").is_err());

    // These would have raft-rs panic, and they say that this member cannot go on.
    let lost = Message { commit: last + 1, ..message(MessageType::MsgHeartbeat) };
    let diverged = Message {
        index: last - 1,
        log_term: 1,
        entries: vec![entry(last, term + 1)].into(),
        term: term + 1,
        ..message(MessageType::MsgAppend)
    };
    for message in [lost, diverged] {
        let bytes = message.write_to_bytes().unwrap();
        let malformed = three.node(follower).step(&bytes).unwrap_err();
        assert!(malformed.is_fatal(), "{message:?}: {malformed}");
    }
}
