use super::*;

const LONG: Option<Duration> = Some(Duration::from_secs(6));
const SHORT: Option<Duration> = Some(HEALTHY_AFTER);

/// What one member of a cluster knows of one.
struct Seen {
    is_started: bool,
    is_learner: bool,
    connected: Option<Duration>,
}

fn voter(is_started: bool, connected: Option<Duration>) -> Seen {
    Seen { is_started, is_learner: false, connected }
}

fn learner() -> Seen {
    Seen { is_started: false, is_learner: true, connected: None }
}

/// Up to `number` voters of which all is well.
fn healthy(number: usize) -> Vec<Seen> {
    (0..number).map(|_| voter(true, LONG)).collect()
}

/// Asks the member with id 1 of these: ids are 1, 2, 3 …
fn ask(seen: &[Seen], question: impl Fn(&View) -> Result<(), Error>) -> Result<(), Error> {
    let record = |(id, seen): (u64, &Seen)| MemberRecord {
        id,
        name: if seen.is_started { format!("member {id}") } else { String::new() },
        is_learner: seen.is_learner,
        ..MemberRecord::default()
    };
    let members = Members::restore(9, (1..).zip(seen).map(record).collect(), Vec::new());
    // It is not connected to itself, nor to what is no member.
    let connected = |id: u64| match id {
        0 | 1 => None,
        id => seen.get(id as usize - 1).and_then(|seen| seen.connected),
    };
    question(&View { members: &members, this: 1, connected: &connected })
}

fn add_voter(seen: &[Seen]) -> Result<(), Error> {
    ask(seen, |view| view.may_add(false))
}

fn add_learner(seen: &[Seen]) -> Result<(), Error> {
    ask(seen, |view| view.may_add(true))
}

fn remove(seen: &[Seen], id: u64) -> Result<(), Error> {
    ask(seen, |view| view.may_remove(id))
}

fn promote(seen: &[Seen]) -> Result<(), Error> {
    ask(seen, |view| view.may_promote())
}

const FEW: Result<(), Error> = Err(Error::NotEnoughStartedMembers);
const UNHEALTHY: Result<(), Error> = Err(Error::UnhealthyCluster);

#[test]
fn the_only_member_may_add_another() {
    assert_eq!(add_voter(&healthy(1)), Ok(()));
    assert_eq!(add_learner(&healthy(1)), Ok(()));
    // It must be started to be asked by a client, but for a moment.
    assert_eq!(add_voter(&[voter(false, None)]), FEW);
}

/// Adding one to three makes a quorum three; two started ones are then too few.
#[test]
fn voters_are_added_while_those_started_stay_a_quorum() {
    assert_eq!(add_voter(&healthy(3)), Ok(()));
    let unstarted = [voter(true, None), voter(true, LONG), voter(false, None)];
    assert_eq!(add_voter(&unstarted), FEW);
    assert_eq!(add_learner(&unstarted), UNHEALTHY, "two connected of the four there would be");
    // A second voter was added and never started: a third one must wait.
    assert_eq!(add_voter(&[voter(true, None), voter(false, None)]), FEW);
    let with_learner = [voter(true, None), learner()];
    assert_eq!(add_voter(&with_learner), Ok(()), "learners do not count");
}

/// The case of etcd issue 21667: the new one is taken for one that is down.
#[test]
fn nobody_is_added_without_connections_that_last() {
    for (down, answer) in [(None, UNHEALTHY), (SHORT, UNHEALTHY), (LONG, Ok(()))] {
        let seen = [voter(true, None), voter(true, LONG), voter(true, down)];
        assert_eq!(add_voter(&seen), answer);
        assert_eq!(add_learner(&seen), answer);
    }
    let one_of_five_down = [
        voter(true, None),
        voter(true, LONG),
        voter(true, LONG),
        voter(true, LONG),
        voter(true, None),
    ];
    assert_eq!(add_voter(&one_of_five_down), Ok(()));
    assert_eq!(add_voter(&[voter(true, None), voter(true, None)]), UNHEALTHY);
    assert_eq!(add_voter(&healthy(2)), Ok(()));
}

#[test]
fn voters_are_removed_while_those_started_stay_a_quorum() {
    assert_eq!(remove(&healthy(1), 1), FEW, "nobody would be left");
    assert_eq!(remove(&healthy(3), 3), Ok(()));
    assert_eq!(remove(&healthy(3), 1), Ok(()), "also itself");
    // The one that never started may go, and one that did may not while it is there.
    let unstarted = [voter(true, None), voter(true, LONG), voter(false, None)];
    assert_eq!(remove(&unstarted, 3), Ok(()));
    assert_eq!(remove(&unstarted, 2), FEW);
    assert_eq!(remove(&[voter(true, None), voter(false, None)], 2), Ok(()));
}

#[test]
fn of_those_connected_a_quorum_is_left() {
    let one_down = [voter(true, None), voter(true, LONG), voter(true, None)];
    assert_eq!(remove(&one_down, 3), Ok(()), "the one that is down");
    assert_eq!(remove(&one_down, 2), UNHEALTHY, "the one that is needed");
    assert_eq!(remove(&one_down, 1), UNHEALTHY);
    let just_back = [voter(true, None), voter(true, LONG), voter(true, SHORT)];
    assert_eq!(remove(&just_back, 3), UNHEALTHY);
    assert_eq!(remove(&healthy(2), 2), Ok(()));
}

#[test]
fn a_learner_and_what_is_unknown_may_be_removed() {
    let seen = [voter(true, None), voter(false, None), learner()];
    assert_eq!(remove(&seen, 3), Ok(()));
    assert_eq!(remove(&healthy(3), 9), Ok(()));
    assert_eq!(remove(&healthy(1), 9), Ok(()));
}

#[test]
fn a_promotion_takes_the_learner_for_started() {
    assert_eq!(promote(&[voter(true, None), learner()]), Ok(()));
    assert_eq!(promote(&[voter(true, None), voter(false, None), learner()]), Ok(()));
    let seen = [voter(true, None), voter(false, None), voter(false, None), learner()];
    assert_eq!(promote(&seen), FEW);
}

#[test]
fn learners_are_limited() {
    let members = |learners: u64| {
        let record = |id| MemberRecord { id, is_learner: id > 1, ..MemberRecord::default() };
        Members::restore(9, (1..=1 + learners).map(record).collect(), Vec::new())
    };
    assert_eq!(check_learner_limit(&members(0), 1), Ok(()));
    assert_eq!(check_learner_limit(&members(1), 1), Err(Error::TooManyLearners));
    assert_eq!(check_learner_limit(&members(1), 2), Ok(()));
    assert_eq!(check_learner_limit(&members(0), 0), Err(Error::TooManyLearners));
}

#[test]
fn nine_tenths_of_the_leaders_log_are_in_sync() {
    let is_in_sync = |matched, leader_matched| Progress { matched, leader_matched }.is_in_sync();
    assert!(is_in_sync(90, 100) && is_in_sync(9, 10) && is_in_sync(100, 100));
    assert!(!is_in_sync(89, 100) && !is_in_sync(0, 1));
    assert!(is_in_sync(u64::MAX, u64::MAX) && !is_in_sync(u64::MAX / 10 * 8, u64::MAX));
}

#[test]
fn peer_urls_are_checked_as_etcd_does() {
    let good = [
        "http://127.0.0.1:2380",
        "https://example.com:443",
        "http://example.com:80",
        " http://[::1]:2380 ",
        "unix://run/etcd.sock",
        "unixs:///run/etcd.sock",
    ];
    for url in good {
        assert_eq!(peer_urls(&[url.to_owned()]), Ok(vec![url.trim().to_owned()]), "{url}");
    }
    let bad = [
        "",
        "127.0.0.1:2380",
        "http://127.0.0.1",
        "http://[::1]",
        "http://127.0.0.1:2380/",
        "http://127.0.0.1:2380/path",
        "http://127.0.0.1:port",
        "ftp://127.0.0.1:2380",
        "http://",
    ];
    for url in bad {
        let urls = ["http://127.0.0.1:2380".to_owned(), url.to_owned()];
        assert_eq!(peer_urls(&urls), Err(Error::MemberBadUrls), "{url}");
    }
    assert_eq!(peer_urls(&[]), Err(Error::MemberBadUrls));
}
