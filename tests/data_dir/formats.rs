//! Directories that released versions left behind, kept in this repository, are opened.
//!
//! ```text
//! tests/data_dir/released/format-1/MANIFEST          each file's path and length
//! tests/data_dir/released/format-1/member/CURRENT    …: without the zeros at its end
//! ```
//!
//! One for each format of the data directory, made with the last version that wrote it:
//!
//! ```text
//! KVORUM_MAKE_FORMAT=1 cargo test --test data_dir formats
//! ```
//!
//! writes `format-1` with this version. What is in it is in [`fill`], and never changes: a version that
//! writes another format adds a directory, and fills it alike.

use std::fs;
use std::path::{Path, PathBuf};

use kvorum::pb::etcdserverpb as pb;
use kvorum::pb::mvccpb::KeyValue;
use kvorum::{Config, Server, StartError};
use prost::Message as _;

use crate::rig::{checkpoint, config, everything, put, soon};

const MANIFEST: &str = "MANIFEST";
/// All that were released.
const FORMATS: &[&str] = &["format-1"];

fn released() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data_dir/released")
}

/// So that entries are in the log and behind its beginning, in the checkpoint and not yet in it.
fn configured(data_dir: &Path) -> Config {
    Config { snapshot_count: 10, snapshot_catchup_entries: 3, ..config(data_dir) }
}

/// Keys with history, a deletion, leases and a compaction.
async fn fill(server: &Server) {
    let grant = pb::LeaseGrantRequest { ttl: 1_000_000, id: 77 };
    server.engine().lease_grant(grant).await.unwrap();
    for number in 0..20 {
        put(server, &format!("key {}", number % 8), &format!("value {number}")).await;
    }
    let leased = pb::PutRequest {
        key: "leased".into(),
        value: "77".into(),
        lease: 77,
        ..pb::PutRequest::default()
    };
    server.engine().put(leased).await.unwrap();
    let delete = pb::DeleteRangeRequest { key: "key 3".into(), ..Default::default() };
    server.engine().delete_range(delete).await.unwrap();
    let compaction = pb::CompactionRequest { revision: 12, physical: true };
    server.engine().compact(compaction).await.unwrap();
    // Larger than what the store keeps in one piece.
    put(server, "large", &"large ".repeat(7000)).await;
    // Writes the checkpoint anew; what follows is in the log alone.
    server.engine().defragment().await.unwrap();
    put(server, "last", "of all").await;
}

async fn assert_filled(server: &Server, what: &str) {
    let found = everything(server).await;
    assert_eq!(found.header.unwrap().revision, 25, "{what}");
    let found: Vec<KeyValue> =
        found.kvs.iter().map(|kv| KeyValue::decode(kv.clone()).unwrap()).collect();
    let keys: Vec<_> = found.iter().map(|kv| String::from_utf8_lossy(&kv.key)).collect();
    let expected =
        ["key 0", "key 1", "key 2", "key 4", "key 5", "key 6", "key 7", "large", "last", "leased"];
    assert_eq!(keys, expected, "{what}");
    let key_0 = &found[0];
    assert_eq!(key_0.value, "value 16", "{what}");
    assert_eq!((key_0.create_revision, key_0.mod_revision, key_0.version), (2, 18, 3), "{what}");
    let leased = &found[9];
    assert_eq!((leased.value.as_ref(), leased.lease), (b"77".as_slice(), 77), "{what}");
    assert_eq!(found[7].value.len(), 42_000, "{what}");
    // Above the compaction there is history, and below none.
    let at = |revision| pb::RangeRequest { key: "key 3".into(), revision, ..Default::default() };
    let before = server.engine().range(at(22)).await.unwrap();
    let before = KeyValue::decode(before.kvs[0].clone()).unwrap();
    assert_eq!((before.value.as_ref(), before.version), (b"value 19".as_slice(), 3), "{what}");
    assert_eq!(server.engine().range(at(11)).await.err(), Some(kvorum::Error::Compacted), "{what}");
    let hash = server.engine().hash_kv(pb::HashKvRequest { revision: 25 }).await.unwrap();
    assert_eq!((hash.compact_revision, hash.hash), (12, HASH), "{what}");
    let ttl = pb::LeaseTimeToLiveRequest { id: 77, keys: true };
    let lease = server.engine().lease_time_to_live(ttl).await.unwrap();
    assert_eq!((lease.granted_ttl, lease.keys), (1_000_000, vec!["leased".into()]), "{what}");
    let request = pb::MemberListRequest { linearizable: false };
    let members = server.engine().member_list(request).await.unwrap().members;
    let [member] = members.as_slice() else { panic!("{what}: {members:?}") };
    assert_eq!((member.name.as_str(), member.is_learner), ("default", false), "{what}");
}

/// `HashKV` when the first of them was made. It is etcd's for the same operations, so it stays.
const HASH: u32 = 2_390_974_048;

/// The files below a directory, by their paths in it.
fn files(dir: &Path, below: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir.join(below)).unwrap() {
        let path = below.join(entry.unwrap().file_name());
        if dir.join(&path).is_dir() {
            files(dir, &path, found);
        } else {
            found.push(path);
        }
    }
    found.sort();
}

fn keep(data_dir: &Path, kept: &Path) {
    let mut found = Vec::new();
    files(data_dir, Path::new(""), &mut found);
    let mut manifest = String::new();
    for path in found {
        let bytes = fs::read(data_dir.join(&path)).unwrap();
        let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        manifest += &format!("{} {}\n", bytes.len(), path.display());
        fs::create_dir_all(kept.join(&path).parent().unwrap()).unwrap();
        fs::write(kept.join(&path), &bytes[..used]).unwrap();
    }
    fs::write(kept.join(MANIFEST), manifest).unwrap();
}

fn unpack(kept: &Path, data_dir: &Path) {
    for line in fs::read_to_string(kept.join(MANIFEST)).unwrap().lines() {
        let (bytes, path) = line.split_once(' ').unwrap();
        let to = data_dir.join(path);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(kept.join(path), &to).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&to).unwrap();
        file.set_len(bytes.parse().unwrap()).unwrap();
    }
    // What git does not keep.
    for entry in fs::read_dir(data_dir.join("member")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with("ckpt-") {
            fs::create_dir_all(path.join("blobs")).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_of_released_formats_are_opened() {
    if let Ok(number) = std::env::var("KVORUM_MAKE_FORMAT") {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        let server = Server::start(configured(&data_dir)).await.expect("it starts");
        fill(&server).await;
        server.shutdown().await.unwrap();
        let kept = released().join(format!("format-{number}"));
        if kept.exists() {
            fs::remove_dir_all(&kept).unwrap();
        }
        keep(&data_dir, &kept);
    }
    for format in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        unpack(&released().join(format), &data_dir);
        // Once as it was, and once as this version has left it.
        for life in 0..2 {
            let what = format!("{format}, life {life}");
            let server = soon(&what, Server::start(configured(&data_dir))).await.expect("it opens");
            assert_filled(&server, &what).await;
            soon(&what, server.shutdown()).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_format_is_refused_with_the_way_back() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    unpack(&released().join("format-1"), &data_dir);
    let current = data_dir.join("member/CURRENT");
    let text = "ckpt-2\nformat 2\n";
    let newer = format!("{text}crc32c {:08x}\n", crc32c::crc32c(text.as_bytes()));
    fs::write(&current, &newer).unwrap();
    let refused = soon("a refusal", Server::start(configured(&data_dir))).await;
    let Err(StartError::Open(error)) = refused else { panic!("it is not refused") };
    let error = error.to_string();
    for words in [current.to_str().unwrap(), "format 2", "up to 1", "snapshot save", "restore"] {
        assert!(error.contains(words), "{words:?} is not in {error}");
    }
    assert_eq!(fs::read_to_string(&current).unwrap(), newer, "nothing is changed");
    assert!(checkpoint(&data_dir).join("db").exists());
}
