//! Servers in this process, on directories that can be looked into between two lives.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvorum::config::Url;
use kvorum::pb::etcdserverpb as pb;
use kvorum::{Config, Server};

/// Far more than anything here takes; a limit for what hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited {PATIENCE:?} for {what}"),
    }
}

/// A server without sockets for clients, in a directory.
pub(crate) fn config(data_dir: &Path) -> Config {
    Config { in_memory: false, data_dir: data_dir.to_owned(), ..Config::in_memory() }
}

/// The configurations of a new cluster's members below `dir`, whose logs are truncated soon.
pub(crate) fn configs(count: usize, dir: &Path) -> Vec<Config> {
    // Kept open until all are known, so that no two are the same.
    let listeners: Vec<_> =
        (0..count).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let url = |listener: &std::net::TcpListener| -> Url {
        format!("http://{}", listener.local_addr().unwrap()).parse().unwrap()
    };
    let peers: Vec<Url> = listeners.iter().map(url).collect();
    let cluster: Vec<(String, Vec<Url>)> = peers
        .iter()
        .enumerate()
        .map(|(number, url)| (format!("m{number}"), vec![url.clone()]))
        .collect();
    let member = |(number, peer): (usize, &Url)| Config {
        name: format!("m{number}"),
        listen_peer_urls: vec![peer.clone()],
        initial_advertise_peer_urls: vec![peer.clone()],
        initial_cluster: cluster.iter().cloned().collect(),
        snapshot_count: 20,
        snapshot_catchup_entries: 5,
        ..config(&dir.join(format!("m{number}")))
    };
    peers.iter().enumerate().map(member).collect()
}

pub(crate) async fn start(configs: &[Config]) -> Vec<Server> {
    let starting: Vec<_> =
        configs.iter().map(|config| tokio::spawn(Server::start(config.clone()))).collect();
    let mut servers = Vec::new();
    for server in starting {
        servers.push(soon("a start", server).await.unwrap().expect("it starts"));
    }
    servers
}

pub(crate) async fn put(server: &Server, key: &str, value: &str) -> i64 {
    let request = pb::PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..pb::PutRequest::default()
    };
    let answer = soon("a put", server.engine().put(request)).await.expect("it is written");
    answer.header.unwrap().revision
}

/// All keys with their versions, from this member's own memory.
pub(crate) async fn everything(server: &Server) -> pb::RangeResponse {
    let request = pb::RangeRequest {
        key: vec![0].into(),
        range_end: vec![0].into(),
        serializable: true,
        ..pb::RangeRequest::default()
    };
    server.engine().range(request).await.expect("a range")
}

/// Hash, revision and compact revision of a member's own state.
pub(crate) async fn hash(server: &Server) -> (u32, i64, i64) {
    let request = pb::HashKvRequest { revision: 0 };
    let answer = server.engine().hash_kv(request).await.expect("a hash");
    (answer.hash, answer.hash_revision, answer.compact_revision)
}

/// The directory of the checkpoint that counts.
pub(crate) fn checkpoint(data_dir: &Path) -> PathBuf {
    let current = fs::read_to_string(data_dir.join("member/CURRENT")).unwrap();
    data_dir.join("member").join(current.lines().next().unwrap())
}

/// What lies in `member/` under a name that begins so.
pub(crate) fn named(data_dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(data_dir.join("member")).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix))
        .collect();
    found.sort();
    found
}

/// All files below a directory.
pub(crate) fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_dir(&path, &target);
        } else {
            copy_file(&path, &target);
        }
    }
}

/// A segment of the log is large and mostly zeros, which a copy need not have.
fn copy_file(from: &Path, to: &Path) {
    let bytes = fs::read(from).unwrap();
    let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    fs::write(to, &bytes[..used]).unwrap();
    let file = fs::OpenOptions::new().write(true).open(to).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}
