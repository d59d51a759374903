//! Members that are listed, added, moved, promoted and removed with etcdctl, as on etcd.

use std::path::Path;

use kvorum::pb::etcdserverpb as pb;

use crate::common::{judge, server};
use crate::rig::{Cluster, Said, until};

/// What was done, and what was said to it, without what is a cluster's own.
type Transcript = Vec<(String, Said)>;

/// Replaces a cluster's ids and addresses by names.
struct Mask(Vec<(String, String)>);

impl Mask {
    fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (from, to) in &self.0 {
            text = text.replace(from, to);
        }
        // The widths of tables follow the ids.
        let squeezed = text.lines().map(|line| {
            let line = line.replace("--", "-").replace("──", "─");
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        });
        let squeezed = squeezed.map(|mut line| {
            while line.contains("--") || line.contains("──") {
                line = line.replace("--", "-").replace("──", "─");
            }
            line
        });
        squeezed.collect::<Vec<_>>().join("\n")
    }

    /// Errors without the line of etcdctl's logger, which tells times and targets.
    fn said(&self, said: &Said) -> Said {
        Said { out: self.text(&said.out), err: self.text(&said.error()), code: said.code }
    }
}

async fn mask(cluster: &Cluster) -> Mask {
    let mut names = Vec::new();
    let mut members = cluster[0].members();
    let listed = members.member_list(pb::MemberListRequest { linearizable: true }).await;
    let listed = listed.unwrap().into_inner();
    let id = |id: u64, name: &str| {
        [(format!("{id:x}"), name.to_owned()), (format!("{id}"), name.to_owned())]
    };
    names.extend(id(listed.header.unwrap().cluster_id, "<cluster>"));
    for member in &cluster.members {
        let (client, peer) = (member.client_url(), member.peer_url());
        names.push((client, format!("<{} client>", member.name)));
        if let Some(found) = listed.members.iter().find(|found| found.peer_ur_ls == [peer.clone()])
        {
            names.extend(id(found.id, &format!("<{}>", member.name)));
        }
        names.push((peer, format!("<{} peer>", member.name)));
    }
    Mask(names)
}

/// The members' life on a cluster of `program`.
async fn life(program: &Path, is_encrypted: bool) -> Transcript {
    let mut cluster = if is_encrypted {
        Cluster::encrypted(program, &[]).await
    } else {
        Cluster::of(program, &[]).await
    };
    let ids = [cluster[0].id().await, cluster[1].id().await, cluster[2].id().await];
    let hex = |id: u64| format!("{id:x}");
    let mut lines = Transcript::new();

    // The first leads, whoever it was.
    let leader = cluster.leader().await;
    if leader != 0 {
        let said = cluster.etcdctl(leader, &["move-leader", &hex(ids[0])]).await;
        assert_eq!(said.code, Some(0), "{said:?}");
    }
    until("the first to lead", || async {
        cluster[2].status().await.filter(|status| status.leader == ids[0])
    })
    .await;

    let seen = |lines: &mut Transcript, mask: &Mask, what: &str, said: &Said| {
        lines.push((mask.text(what), mask.said(said)));
    };
    let names = mask(&cluster).await;
    assert_eq!(cluster.etcdctl(1, &["put", "k", "v"]).await.out, "OK\n");
    cluster.equal().await;
    for format in ["simple", "table", "fields"] {
        for at in 0..3 {
            let said = cluster.etcdctl(at, &["member", "list", "-w", format]).await;
            // Etcd lists in no order.
            let mut rows: Vec<&str> = said.out.lines().collect();
            if format == "simple" {
                rows.sort_unstable_by_key(|row| names.text(row));
            } else {
                rows.truncate(3);
            }
            let said = Said { out: rows.join("\n"), ..said };
            if format != "fields" {
                seen(&mut lines, &names, &format!("member list -w {format}"), &said);
            }
        }
    }
    let health = cluster.etcdctl(1, &["endpoint", "health", "--cluster"]).await;
    assert_eq!(health.code, Some(0), "{health:?}");
    assert_eq!(
        health.out.matches("is healthy").count() + health.err.matches("is healthy").count(),
        3
    );
    let table = cluster.etcdctl(1, &["endpoint", "status", "--cluster", "-w", "table"]).await;
    assert_eq!((table.code, table.out.matches(" true ").count()), (Some(0), 1), "{table:?}");
    let status = cluster.etcdctl(1, &["endpoint", "status", "--cluster"]).await;
    let fields = status.out.lines().map(|line| line.split(", ").count());
    seen(
        &mut lines,
        &names,
        &format!("{:?}", fields.collect::<Vec<_>>()),
        &Said { out: String::new(), ..status.clone() },
    );
    let hashes = cluster.etcdctl(2, &["endpoint", "hashkv", "--cluster"]).await;
    let mut rows: Vec<String> = hashes.out.lines().map(|row| names.text(row)).collect();
    rows.sort_unstable();
    seen(&mut lines, &names, "hashkv", &Said { out: rows.join("\n"), ..hashes });

    // Leadership.
    for (at, to) in [(0, 1), (1, ids[2]), (0, ids[0]), (0, 0xffff)] {
        let said = cluster.etcdctl(at, &["move-leader", &hex(to)]).await;
        seen(&mut lines, &names, &format!("move-leader at {at}"), &said);
    }
    let mut follower = cluster[1].maintenance();
    let refused = follower.move_leader(pb::MoveLeaderRequest { target_id: ids[2] }).await;
    let refused = refused.expect_err("it does not lead");
    lines.push((format!("{:?}: {}", refused.code(), refused.message()), none()));
    let said = cluster.etcdctl(0, &["move-leader", &hex(ids[2])]).await;
    seen(&mut lines, &names, "move-leader", &said);
    until("the third to lead", || async {
        cluster[1].status().await.filter(|status| status.leader == ids[2])
    })
    .await;

    // A learner.
    let new = cluster.join("m4");
    let url = format!("--peer-urls={}", cluster[new].peer_url());
    let said = cluster.etcdctl_until(0, &["member", "add", "m4", "--learner", &url]).await;
    let names = mask(&cluster).await;
    let said = Said {
        out: said
            .out
            .lines()
            .filter(|line| !line.contains("INITIAL_CLUSTER="))
            .collect::<Vec<_>>()
            .join("\n"),
        ..said
    };
    seen(&mut lines, &names, "member add --learner", &said);
    let added =
        cluster[0].members().member_list(pb::MemberListRequest { linearizable: true }).await;
    let added = added.unwrap().into_inner().members.into_iter().find(|member| member.is_learner);
    let m4 = hex(added.unwrap().id);
    // Of that URL alone the id would be the same within a second, which is another error.
    let twice = format!("{url},http://127.0.0.1:1");
    for (at, arguments) in [
        (0, vec!["member", "add", "m4", "--learner", twice.as_str()]),
        (1, vec!["member", "add", "m5", "--learner", "--peer-urls=http://127.0.0.1:1"]),
        (1, vec!["member", "add", "m5", "--peer-urls=http://127.0.0.1:1/path"]),
        (0, vec!["member", "promote", m4.as_str()]),
        (2, vec!["member", "promote", m4.as_str()]),
        (1, vec!["member", "promote", "1234"]),
        (1, vec!["member", "remove", "1234"]),
        (1, vec!["member", "update", "1234", "--peer-urls=http://127.0.0.1:1"]),
        (1, vec!["member", "update", m4.as_str(), "--peer-urls", &cluster[0].peer_url()]),
        (2, vec!["move-leader", m4.as_str()]),
    ] {
        // Each member's connections have to have lasted for a while, before it says anything else.
        let said = until("the member to find the cluster healthy", || async {
            let said = cluster.etcdctl(at, &arguments).await;
            Some(said).filter(|said| !said.err.contains("unhealthy cluster"))
        })
        .await;
        seen(&mut lines, &names, &format!("{} {}", arguments[0], arguments[1]), &said);
    }
    let promoted = hex(ids[0]);
    let said = cluster.etcdctl(0, &["member", "promote", &promoted]).await;
    seen(&mut lines, &names, "promote a voter", &said);

    cluster[new].spawn();
    until("the learner to have the data", || async {
        let mut kv = cluster[new].kv();
        let request = pb::RangeRequest { serializable: true, ..crate::rig::get("k") };
        kv.range(request).await.ok().filter(|answer| answer.get_ref().count == 1)
    })
    .await;
    for arguments in [
        &["get", "k", "--consistency=s"][..],
        &["get", "k"],
        &["put", "k", "w"],
        &["member", "list"],
        &["lease", "grant", "10"],
        &["endpoint", "hashkv"],
        &["move-leader", "1"],
    ] {
        let said = cluster.etcdctl(new, arguments).await;
        seen(&mut lines, &names, &format!("learner: {}", arguments.join(" ")), &said);
    }
    let said = cluster.etcdctl_until(0, &["member", "promote", &m4]).await;
    seen(&mut lines, &names, "promote at a follower", &said);
    cluster[new].healthy().await;
    let said = cluster.etcdctl(new, &["get", "k"]).await;
    seen(&mut lines, &names, "get from who was promoted", &said);
    let said = cluster.etcdctl(new, &["member", "promote", &m4]).await;
    seen(&mut lines, &names, "promote twice", &said);

    // It moves.
    cluster[new].terminate().await;
    cluster[new].peer_port = crate::common::ports::free_port();
    let url = format!("--peer-urls={}", cluster[new].peer_url());
    let said = cluster.etcdctl_until(1, &["member", "update", &m4, &url]).await;
    let names = mask(&cluster).await;
    seen(&mut lines, &names, "member update", &said);
    cluster[new].start().await;
    cluster.equal().await;
    assert_eq!(cluster.etcdctl(new, &["put", "after", "update"]).await.out, "OK\n");

    // It is removed, through a follower.
    let said = cluster.etcdctl_until(0, &["member", "remove", &m4]).await;
    seen(&mut lines, &names, "member remove", &said);
    let status = cluster[new].ended().await;
    lines.push((format!("the removed member ends with {:?}", status.code()), none()));
    let said = cluster.etcdctl(1, &["member", "remove", &m4]).await;
    seen(&mut lines, &names, "remove twice", &said);
    lines
}

fn none() -> Said {
    Said { out: String::new(), err: String::new(), code: None }
}

async fn compare(test: &str, is_encrypted: bool) {
    let Some(judges) = judge::find(test) else { return };
    let program = server::kvorum();
    let (etcd, kvorum) =
        tokio::join!(life(&judges.etcd, is_encrypted), life(&program, is_encrypted));
    for (etcd, kvorum) in etcd.iter().zip(&kvorum) {
        assert_eq!(etcd, kvorum);
    }
    assert_eq!(etcd.len(), kvorum.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go_as_on_etcd() {
    compare("members_come_and_go_as_on_etcd", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go_as_on_etcd_when_all_connections_need_certificates() {
    let test = "members_come_and_go_as_on_etcd_when_all_connections_need_certificates";
    compare(test, true).await;
}
