//! An etcd that is started by mistake on a directory of kvorum refuses it, and costs nothing.
//!
//! The real etcd of each minor is started where a member of kvorum was stopped: with its log inside
//! the data directory, or elsewhere, told to both programs or to kvorum alone.

use std::fs;
use std::path::{Path, PathBuf};

use kvorum::{Config, Server, StartError};

use crate::common::http;
use crate::common::judge::{self, Judges};
use crate::common::ports::free_port;
use crate::common::process::{Started, strings, until};
use crate::rig::{config, everything, files_below, put, soon};

const GUARD: &str = "kvorum.wal";

/// Where an etcd is started on a member's directories.
struct Mistake {
    directory: PathBuf,
    config: Config,
    /// What etcd is told.
    wal_dir: Option<&'static str>,
}

impl Mistake {
    fn new(directory: &Path, ours: Option<&str>, theirs: Option<&'static str>) -> Mistake {
        let wal_dir = ours.map(|name| directory.join(name));
        let config = Config { wal_dir, ..config(&directory.join("data")) };
        Mistake { directory: directory.to_owned(), config, wal_dir: theirs }
    }

    fn start_etcd(&self, judges: &Judges) -> Started {
        self.start_etcd_at(judges, &format!("127.0.0.1:{}", free_port()))
    }

    fn start_etcd_at(&self, judges: &Judges, address: &str) -> Started {
        let client = format!("http://{address}");
        let peer = format!("http://127.0.0.1:{}", free_port());
        let mut arguments = strings(&["--data-dir", "data", "--log-level=warn"]);
        arguments.extend(strings(&["--listen-client-urls", &client]));
        arguments.extend(strings(&["--advertise-client-urls", &client]));
        arguments.extend(strings(&["--listen-peer-urls", &peer]));
        arguments.extend(self.wal_dir.map(|wal_dir| format!("--wal-dir={wal_dir}")));
        Started::new(&judges.etcd, &self.directory, &arguments)
    }

    /// The files of the member, and what is in them; without those that etcd may have made.
    fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let log = self.config.wal_dir.clone();
        let mut found = files_below(&self.config.data_dir.join("member"));
        found.extend(log.iter().flat_map(|log| files_below(log)));
        found.retain(|path| !path.ends_with("snap/db"));
        found.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
    }

    async fn start(&self) -> Server {
        soon("a start", Server::start(self.config.clone())).await.expect("it starts")
    }
}

async fn stop(server: Server) {
    soon("a shutdown", server.shutdown()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_refuses_a_members_directory_and_changes_nothing() {
    let Some(judges) = judge::find_minors("etcd on kvorum's directory", &["v3.6", "v3.5"]) else {
        return;
    };
    for (minor, judges) in judges {
        for (ours, theirs) in [(None, None), (Some("log"), Some("log")), (Some("log"), None)] {
            let what = format!("etcd {minor}, log in {ours:?}, etcd's in {theirs:?}");
            let dir = tempfile::tempdir().unwrap();
            let mistake = Mistake::new(dir.path(), ours, theirs);
            let server = mistake.start().await;
            put(&server, "acknowledged", &what).await;
            let before = everything(&server).await.kvs;
            stop(server).await;
            for _ in 0..2 {
                let files = mistake.files();
                let mut etcd = mistake.start_etcd(&judges);
                assert!(!etcd.ended().success(), "{what}: {}", etcd.log());
                assert!(etcd.log().contains(GUARD), "{what}: {}", etcd.log());
                assert!(mistake.files() == files, "{what}: it has changed something");
                let server = mistake.start().await;
                assert!(everything(&server).await.kvs == before, "{what}");
                stop(server).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guard_comes_back_at_the_next_start_and_is_no_condition_for_one() {
    let dir = tempfile::tempdir().unwrap();
    for ours in [None, Some("log")] {
        let mistake = Mistake::new(&dir.path().join(ours.unwrap_or("inside")), ours, None);
        let inside = mistake.config.data_dir.join("member/wal").join(GUARD);
        let beside = mistake.config.wal_dir.as_ref().map(|log| log.join(GUARD));
        let guards: Vec<PathBuf> = std::iter::once(inside).chain(beside).collect();
        stop(mistake.start().await).await;
        for guard in &guards {
            let said = fs::read_to_string(guard).unwrap();
            assert!(said.contains("kvorum") && said.contains("etcd"), "{said}");
            fs::remove_file(guard).unwrap();
        }
        stop(mistake.start().await).await;
        for guard in &guards {
            assert!(guard.is_file(), "{}", guard.display());
            // Where it cannot be made, on a full disk, say, the member starts all the same.
            fs::remove_file(guard).unwrap();
            fs::create_dir(guard).unwrap();
        }
        stop(mistake.start().await).await;
    }
}

/// An etcd that is told of another log finds none there, and begins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_etcd_has_served_in_between_is_not_passed_over() {
    let Some(judges) = judge::find("etcd beside kvorum's log") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mistake = Mistake::new(dir.path(), None, Some("another"));
    let server = mistake.start().await;
    put(&server, "acknowledged", "").await;
    let before = everything(&server).await.kvs;
    stop(server).await;
    let files = mistake.files();
    let address = format!("127.0.0.1:{}", free_port());
    let mut etcd = mistake.start_etcd_at(&judges, &address);
    until("a healthy etcd", || {
        http::get(&address, "/health").is_ok_and(|answer| answer.status == 200).then_some(())
    });
    assert!(etcd.terminate().code().is_none_or(|code| code == 0), "{}", etcd.log());
    assert!(mistake.files() == files, "kvorum's files are as they were");

    let refused = soon("a refusal", Server::start(mistake.config.clone())).await;
    let Err(StartError::Open(error)) = refused else { panic!("it is not refused") };
    let error = error.to_string();
    for word in ["member/snap/db", "move it away", mistake.config.data_dir.to_str().unwrap()] {
        assert!(error.contains(word), "{word:?} is not in {error}");
    }
    // What it says.
    let moved = dir.path().join("etcds");
    fs::rename(mistake.config.data_dir.join("member/snap/db"), moved).unwrap();
    let server = mistake.start().await;
    assert!(everything(&server).await.kvs == before);
    stop(server).await;
}
