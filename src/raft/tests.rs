use bytes::Bytes;

use super::*;

/// An entry of the log that holds a command.
fn command_entry(index: u64, term: u64, data: Bytes) -> Entry {
    Entry { index, term, kind: EntryType::EntryNormal as u8, data, context: Bytes::new() }
}

fn lone(hard_state: HardState, start: Mark, entries: Vec<Entry>, applied: u64) -> Node {
    Node::new(Start {
        id: 7,
        election_ticks: 10,
        catch_up_entries: 5,
        pre_vote: true,
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
    node.propose(b"one".to_vec()).expect("leader");
    node.propose(b"two".to_vec()).expect("leader");
    let committed = settle(&mut node);
    let data: Vec<_> = committed.iter().map(|entry| &entry.data[..]).collect();
    assert_eq!(data, [b"one", b"two"]);
    assert!(committed.iter().all(is_command));
}

/// etcd #14370: a single member acknowledged before its fsync.
#[test]
fn nothing_is_committed_before_it_is_persisted() {
    let mut node = empty();
    lead(&mut node);
    node.propose(b"one".to_vec()).expect("leader");
    let effects = node.effects().expect("effects").expect("an append");
    let first = effects.append.expect("an append").number;
    assert!(effects.committed.is_empty());

    // A second write is handed out while the first is on its way to the disk.
    node.propose(b"two".to_vec()).expect("leader");
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
    assert_eq!(node.propose(b"one".to_vec()), Err(Refused::NotLeader));
}

#[test]
fn a_read_index_is_the_commit_index_of_the_leader() {
    let mut node = empty();
    assert!(!node.read_index(1), "without a leader it is dropped");
    lead(&mut node);
    node.propose(b"one".to_vec()).expect("leader");
    let last = settle(&mut node).last().expect("committed").index;
    assert!(node.read_index(2));
    let effects = node.effects().expect("effects").expect("a read");
    assert_eq!(effects.reads, [ReadReady { context: 2, index: last }]);
    assert!(effects.append.is_none());
}

/// Reads without writes must not pile up records of effects inside raft.
#[test]
fn effects_without_a_write_are_forgotten() {
    let mut node = empty();
    lead(&mut node);
    for context in 10..1000 {
        assert!(node.read_index(context));
        settle(&mut node);
    }
    node.propose(b"one".to_vec()).expect("leader");
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
    let indexes: Vec<_> = committed.iter().map(|entry| (entry.index, is_command(entry))).collect();
    assert_eq!(indexes, [(6, true), (7, false)], "entry 7 is the new term's first");
    assert_eq!(node.role.term, 3);
}

#[test]
fn a_log_that_lost_its_end_is_refused() {
    let start = Start {
        id: 7,
        election_ticks: 10,
        catch_up_entries: 5,
        pre_vote: true,
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
        node.propose(vec![value]).expect("leader");
    }
    let last = settle(&mut node).last().expect("committed").index;
    let term_of = |node: &Node, index| raft::Storage::term(node.raw.store(), index).ok();
    assert_eq!(term_of(&node, last - 6), None);
    assert_eq!(term_of(&node, last - 5), Some(1), "the term at the cut is known");
    assert_eq!(term_of(&node, last), Some(1));
    node.propose(b"more".to_vec()).expect("leader");
    assert_eq!(settle(&mut node).len(), 1);
}

#[test]
fn applied_entries_are_kept_up_to_a_size() {
    let mut node = empty();
    lead(&mut node);
    for _ in 0..6 {
        node.propose(vec![0; 1024 * 1024]).expect("leader");
        settle(&mut node);
    }
    let first = raft::Storage::first_index(node.raw.store()).expect("a first index");
    let last = raft::Storage::last_index(node.raw.store()).expect("a last index");
    assert_eq!(last + 1 - first, 4, "4 MiB");
}
