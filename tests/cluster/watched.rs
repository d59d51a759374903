//! What operators watch: metrics and health of a cluster, the JSON gateway, and the commands
//! of the documents, typed as they are written there.

use std::path::Path;
use std::process::Command;

use kvorum::pb::etcdserverpb as pb;

use crate::common::process::{Started, strings};
use crate::common::scrape::Scrape;
use crate::common::{http, judge, server};
use crate::rig::{Cluster, until};

async fn scrape(cluster: &Cluster, at: usize) -> Scrape {
    let address = cluster[at].address();
    tokio::task::spawn_blocking(move || Scrape::of(&address)).await.unwrap()
}

/// The series of peers, with their names only.
fn of_peers(scrape: &Scrape) -> Vec<String> {
    let names = scrape.types.keys();
    names.filter(|name| name.starts_with("etcd_network_")).cloned().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_tell_who_leads_and_who_is_connected_as_on_etcd() {
    let test = "metrics_tell_who_leads_and_who_is_connected_as_on_etcd";
    let Some(judges) = judge::find(test) else { return };
    let mut etcd = Cluster::of(&judges.etcd, &[]).await;
    let mut kvorum = Cluster::start(&[]).await;
    for cluster in [&mut etcd, &mut kvorum] {
        let leader = cluster.leader().await;
        cluster[leader].put("k", "v").await.unwrap();
        for at in 0..3 {
            let scrape = scrape(cluster, at).await;
            assert_eq!(scrape.value("etcd_server_has_leader"), 1.0);
            let leads = f64::from(u8::from(at == leader));
            assert_eq!(scrape.value("etcd_server_is_leader"), leads);
            assert!(scrape.value("etcd_server_leader_changes_seen_total") >= 1.0);
            assert_eq!(scrape.value("etcd_server_is_learner"), 0.0);
            let own = cluster[at].id().await;
            for other in 0..3 {
                let id = cluster[other].id().await;
                if id == own {
                    continue;
                }
                let active =
                    format!("etcd_network_active_peers{{Local=\"{own:x}\",Remote=\"{id:x}\"}}");
                assert_eq!(scrape.value(&active), 1.0);
                // Followers have nothing to tell each other.
                if ![at, other].contains(&leader) {
                    continue;
                }
                for name in ["sent_bytes_total", "received_bytes_total"] {
                    let end = if name.starts_with("sent") { "To" } else { "From" };
                    let series = format!("etcd_network_peer_{name}{{{end}=\"{id:x}\"}}");
                    assert!(scrape.value(&series) > 0.0, "{series}");
                }
            }
        }
        // A change of the leader is counted by who is left.
        let left = (leader + 1) % 3;
        let before = scrape(cluster, left).await.value("etcd_server_leader_changes_seen_total");
        cluster[leader].kill();
        let next = cluster.leader().await;
        until("the change to be counted", || async {
            let scrape = scrape(cluster, left).await;
            let changes = scrape.value("etcd_server_leader_changes_seen_total");
            (changes > before && scrape.value("etcd_server_has_leader") == 1.0).then_some(())
        })
        .await;
        assert_eq!(scrape(cluster, next).await.value("etcd_server_is_leader"), 1.0);
        // And then nobody leads.
        cluster[next].kill();
        let last = (0..3).find(|at| ![leader, next].contains(at)).unwrap();
        until("no leader", || async {
            (scrape(cluster, last).await.value("etcd_server_has_leader") == 0.0).then_some(())
        })
        .await;
        assert_eq!(scrape(cluster, last).await.value("etcd_server_is_leader"), 0.0);
        cluster.start_all().await;
    }
    let (etcd, kvorum) = (scrape(&etcd, 0).await, scrape(&kvorum, 0).await);
    let (etcd, kvorum) = (of_peers(&etcd), of_peers(&kvorum));
    let missing: Vec<_> = etcd.iter().filter(|name| !kvorum.contains(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gateway_of_every_member_speaks_for_the_cluster() {
    let cluster = Cluster::start(&[]).await;
    let post = async |at: usize, path: &str, body: &str| {
        let (address, path, body) = (cluster[at].address(), path.to_owned(), body.to_owned());
        let answer = tokio::task::spawn_blocking(move || {
            http::request(&address, "POST", &path, &[], body.as_bytes()).unwrap()
        });
        let answer = answer.await.unwrap();
        let json: serde_json::Value = serde_json::from_str(&answer.text()).unwrap();
        (answer.status, json)
    };
    for at in 0..3 {
        // "k" and "0", "1", "2" in base64.
        let value = ["MA==", "MQ==", "Mg=="][at];
        let (status, put) =
            post(at, "/v3/kv/put", &format!(r#"{{"key":"aw==","value":"{value}"}}"#)).await;
        assert_eq!(status, 200, "{put}");
        for other in 0..3 {
            let (status, range) = post(other, "/v3/kv/range", r#"{"key":"aw=="}"#).await;
            assert_eq!((status, range["kvs"][0]["value"].as_str()), (200, Some(value)));
            let id = cluster[other].id().await.to_string();
            assert_eq!(range["header"]["member_id"].as_str(), Some(id.as_str()));
        }
        let (status, listed) = post(at, "/v3/cluster/member/list", "{}").await;
        assert_eq!((status, listed["members"].as_array().map(Vec::len)), (200, Some(3)));
    }
    let id = cluster[0].id().await;
    let (status, refused) =
        post(1, "/v3/cluster/member/promote", &format!(r#"{{"ID":"{id}"}}"#)).await;
    assert_eq!(status, 400, "{refused}");
    assert_eq!(refused["message"], "etcdserver: can only promote a learner member");
}

/// The commands of docs/cluster.md, and the script beside the files, on the usual ports.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documents_commands_make_a_cluster_and_kill_its_leader() {
    let test = "the_documents_commands_make_a_cluster_and_kill_its_leader";
    let Some(judges) = judge::find(test) else { return };
    let ports = [2379, 2380, 12379, 12380, 22379, 22380, 32379, 32380];
    if ports.iter().any(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_err()) {
        return eprintln!("skipped {test}: a port of {ports:?} is taken");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = tempfile::TempDir::new().unwrap();
    std::os::unix::fs::symlink(root.join("config"), directory.path().join("config")).unwrap();
    let start = |member: usize| {
        let flag = format!("--config-file=config/one-machine-{member}.yml");
        Started::new(&server::kvorum(), directory.path(), &strings(&[&flag]))
    };
    let mut members: Vec<Started> = (1..=3).map(start).collect();
    // Other processes on this machine may be called the same: ends the one that is meant.
    let pkill = "#!/bin/sh\n[ \"$1 $2\" = '-KILL -f' ] || exit 2\n\
                 member=${3#'[c]onfig-file=config/one-machine-'}\nkill -KILL $(cat pid-${member%.yml})\n";
    let bin = directory.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    std::fs::write(bin.join("pkill"), pkill).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(bin.join("pkill"), executable).unwrap();
    for (index, member) in members.iter().enumerate() {
        let file = directory.path().join(format!("pid-{}", index + 1));
        std::fs::write(file, member.pid().to_string()).unwrap();
    }
    let tools = judges.etcdctl.parent().unwrap().display().to_string();
    let path = format!("{}:{tools}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let shell = |line: &str| {
        let output = Command::new("sh")
            .args(["-c", line])
            .current_dir(directory.path())
            .env("PATH", &path)
            .env("ETCDCTL_ENDPOINTS", "127.0.0.1:2379,127.0.0.1:22379,127.0.0.1:32379")
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    };
    until("all to serve", || async {
        let said = shell("etcdctl endpoint health");
        said.0.then_some(())
    })
    .await;
    let (done, out, err) = shell("etcdctl endpoint status -w table");
    assert!(done && out.matches(" true ").count() == 1, "{out} {err}");
    assert_eq!(shell("etcdctl put greeting hello").1, "OK\n");
    let (done, out, err) = shell("config/kill-leader.sh");
    assert!(done, "{out} {err}");
    assert!(out.starts_with("killing member ") && out.contains("still here, without member"));
    let killed: usize = out.split([' ', ',']).nth(2).unwrap().parse().unwrap();
    members[killed - 1] = start(killed);
    until("it to be back", || async { shell("etcdctl endpoint health").0.then_some(()) }).await;

    // Adding a member, as printed.
    let flags = strings(&[
        "--name=n4",
        "--listen-peer-urls=http://127.0.0.1:12380",
        "--listen-client-urls=http://127.0.0.1:12379",
        "--advertise-client-urls=http://127.0.0.1:12379",
    ]);
    let added = until("the member to be added", || async {
        let said = shell("etcdctl member add n4 --learner --peer-urls=http://127.0.0.1:12380");
        said.0.then_some(said.1)
    })
    .await;
    let variables: Vec<(String, String)> = added
        .lines()
        .filter_map(|line| line.strip_prefix("ETCD_")?.split_once('='))
        .map(|(name, value)| (format!("ETCD_{name}"), value.trim_matches('"').to_owned()))
        .filter(|(name, _)| name != "ETCD_NAME")
        .collect();
    assert_eq!(variables.len(), 3, "{added}");
    let variables: Vec<_> =
        variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let mut new =
        Started::with_environment(&server::kvorum(), directory.path(), &flags, &variables);
    let id = added.split_whitespace().nth(1).unwrap();
    until("the member to be promoted", || async {
        shell(&format!("etcdctl member promote {id}")).0.then_some(())
    })
    .await;
    // The member itself learns a moment later that it votes.
    let found = until("the member to answer", || async {
        let said = shell("ETCDCTL_ENDPOINTS=127.0.0.1:12379 etcdctl get greeting");
        said.0.then_some(said.1)
    });
    let found = found.await;
    assert!(found.starts_with("greeting\nstill here"), "{found}");
    let (done, out, err) = shell(&format!("etcdctl member remove {id}"));
    assert!(done, "{out} {err}");
    assert_eq!(new.ended().code(), Some(0));

    // The leader is handed over.
    let (_, status, _) = shell("etcdctl endpoint status");
    let row = status.lines().find(|line| line.contains(", false, false, ")).unwrap();
    let follower = row.split(", ").nth(1).unwrap();
    let (done, out, err) = shell(&format!("etcdctl move-leader {follower}"));
    assert!(done && out.starts_with("Leadership transferred"), "{out} {err}");
    for member in &mut members {
        assert_eq!(member.terminate().code(), Some(0));
    }
}

/// A learner is no place for clients: `/readyz` says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_of_a_learner_is_told_as_on_etcd() {
    let test = "health_of_a_learner_is_told_as_on_etcd";
    let Some(judges) = judge::find(test) else { return };
    let learn = async |program: &Path| {
        let mut cluster = Cluster::of(program, &[]).await;
        cluster[0].put("k", "v").await.unwrap();
        let new = cluster.join("m4");
        cluster.add(0, cluster[new].peer_url(), true).await;
        cluster[new].spawn();
        until("the learner to have the data", || async {
            let request = pb::RangeRequest { serializable: true, ..crate::rig::get("k") };
            let answer = cluster[new].kv().range(request).await.ok()?;
            (answer.get_ref().count == 1).then_some(())
        })
        .await;
        let mut answers = Vec::new();
        for path in ["/health", "/health?serializable=true", "/livez", "/readyz"] {
            let (status, body) = cluster[new].get(path).await.unwrap();
            let mut lines: Vec<&str> = body.lines().collect();
            lines.sort_unstable();
            answers.push(format!("{path}: {status} {lines:?}"));
        }
        let scrape = scrape(&cluster, new).await;
        answers.push(format!("{}", scrape.value("etcd_server_is_learner")));
        answers
    };
    let program = server::kvorum();
    let (etcd, kvorum) = tokio::join!(learn(&judges.etcd), learn(&program));
    assert_eq!(etcd, kvorum);
}
