//! `kvorum snapshot restore`: the flags of `etcdutl snapshot restore`, and `--disable-auth`.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;

use kvorum::config::Url;
use kvorum::runtime::restore::{self, Restore, Restored};

use super::{Arguments, Failure, Flag, WRITE_OUT};

/// The flags.
pub(super) const FLAGS: &[Flag] = &[
    Flag {
        name: "data-dir",
        kind: "string",
        default: "",
        help: "Path to the output data directory; <name>.etcd when not set",
    },
    Flag {
        name: "wal-dir",
        kind: "string",
        default: "",
        help: "Path to the WAL directory (use --data-dir if none given)",
    },
    Flag {
        name: "name",
        kind: "string",
        default: "default",
        help: "Human-readable name for this member",
    },
    Flag {
        name: "initial-cluster",
        kind: "string",
        default: "default=http://localhost:2380",
        help: "Initial cluster configuration for restore bootstrap",
    },
    Flag {
        name: "initial-cluster-token",
        kind: "string",
        default: "etcd-cluster",
        help: "Initial cluster token for the etcd cluster during restore bootstrap",
    },
    Flag {
        name: "initial-advertise-peer-urls",
        kind: "string",
        default: "http://localhost:2380",
        help: "List of this member's peer URLs to advertise to the rest of the cluster",
    },
    Flag {
        name: "skip-hash-check",
        kind: "",
        default: "",
        help: "Ignore snapshot integrity hash value (required if copied from data directory)",
    },
    Flag {
        name: "bump-revision",
        kind: "uint",
        default: "0",
        help: "How much to increase the latest revision after restore",
    },
    Flag {
        name: "mark-compacted",
        kind: "",
        default: "",
        help: "Mark the latest revision after restore as the point of scheduled compaction \
               (required if --bump-revision > 0, disallowed otherwise)",
    },
    Flag {
        name: "disable-auth",
        kind: "",
        default: "",
        help: "Restore a snapshot in which authentication is enabled, with authentication \
               disabled; users and roles are kept",
    },
    Flag {
        name: "initial-memory-map-size",
        kind: "uint",
        default: "0",
        help: "Accepted for etcd's sake: nothing is mapped",
    },
    Flag {
        name: "timeout",
        kind: "duration",
        default: "10s",
        help: "Accepted for etcd's sake: a snapshot file is not locked",
    },
    WRITE_OUT,
];

/// Carries the command out.
pub(super) fn run(arguments: &Arguments) -> Result<String, Failure> {
    let file = PathBuf::from(arguments.only("snapshot restore requires exactly one argument")?);
    let bump = arguments.get("bump-revision");
    let bump_revision = bump.parse().map_err(|_| {
        Failure::new(format!("invalid argument {bump:?} for \"--bump-revision\" flag"))
    })?;
    if (bump_revision > 0) != arguments.is_set("mark-compacted") {
        return Err(Failure::usage("--mark-compacted required if --revision-bump > 0"));
    }
    let name = arguments.get("name").to_owned();
    let advertised = arguments.get("initial-advertise-peer-urls");
    let initial_cluster = cluster(arguments.get("initial-cluster"))?;
    check_cluster(&name, &initial_cluster, advertised)?;
    let directory =
        |name| Some(arguments.get(name)).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let restore = Restore {
        file,
        data_dir: directory("data-dir").unwrap_or_else(|| restore::default_data_dir(&name)),
        wal_dir: directory("wal-dir"),
        name,
        initial_cluster,
        cluster_token: arguments.get("initial-cluster-token").to_owned(),
        skip_hash_check: arguments.is_set("skip-hash-check"),
        bump_revision,
        disable_auth: arguments.is_set("disable-auth"),
    };
    let mut progress = Progress { is_shown: io::stderr().is_terminal(), percent: None };
    let restored = restore::restore(&restore, &mut |done, of| progress.show(done, of));
    progress.end();
    let Restored { member_id, cluster_id, revision, records } = restored.map_err(Failure::new)?;
    let _ = writeln!(
        io::stderr(),
        "restored snapshot {}: revision {revision}, {records} rows, member {member_id:x} of \
         cluster {cluster_id:x}, data-dir {}",
        restore.file.display(),
        restore.data_dir.display()
    );
    Ok(String::new())
}

/// `a=http://…,b=http://…`: names with their URLs; a name may come several times.
fn cluster(text: &str) -> Result<Vec<(String, Vec<String>)>, Failure> {
    let wrong = |what: String| Failure::new(format!("--initial-cluster={text}: {what}"));
    let mut members: Vec<(String, Vec<String>)> = Vec::new();
    for part in text.split(',') {
        let (name, url) = part
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| wrong(format!("{part:?} is not <name>=<peer url>")))?;
        let url = url_of(url).map_err(|error| wrong(format!("{url:?}: {error}")))?;
        if members.iter().any(|(_, urls)| urls.contains(&url)) {
            return Err(Failure::new(format!("initial cluster {text} has duplicate url")));
        }
        match members.iter_mut().find(|(known, _)| known == name) {
            Some((_, urls)) => urls.push(url),
            None => members.push((name.to_owned(), vec![url])),
        }
    }
    Ok(members)
}

fn url_of(text: &str) -> Result<String, String> {
    let url: Url = text.trim().parse()?;
    Ok(url.as_str().to_owned())
}

/// The member has to be one of the cluster, and to be reached where that says. (etcd resolves
/// names before it compares; what is restored here is named the same in both flags.)
fn check_cluster(
    name: &str,
    cluster: &[(String, Vec<String>)],
    advertised: &str,
) -> Result<(), Failure> {
    let this = cluster.iter().find(|(known, _)| known == name);
    let (_, urls) = this.ok_or_else(|| {
        Failure::new(format!(
            "couldn't find local name {name:?} in the initial cluster configuration"
        ))
    })?;
    let wrong = |what| Failure::new(format!("--initial-advertise-peer-urls={advertised}: {what}"));
    let mut own = Vec::new();
    for url in advertised.split(',') {
        own.push(url_of(url).map_err(|error| wrong(format!("{url:?}: {error}")))?);
    }
    if let Some(missing) = urls.iter().find(|url| !own.contains(url)) {
        return Err(Failure::new(format!(
            "--initial-cluster has {name}={missing} but missing from \
             --initial-advertise-peer-urls={advertised}"
        )));
    }
    if let Some(missing) = own.iter().find(|url| !urls.contains(url)) {
        return Err(Failure::new(format!(
            "--initial-advertise-peer-urls has {missing} but missing from --initial-cluster: add \
             {name}={missing} to it"
        )));
    }
    Ok(())
}

/// How far it is, for whoever looks at a terminal.
struct Progress {
    is_shown: bool,
    percent: Option<u64>,
}

impl Progress {
    fn show(&mut self, done: u64, of: u64) {
        let percent = done.saturating_mul(100) / of.max(1);
        if self.is_shown && self.percent != Some(percent) {
            self.percent = Some(percent);
            let _ = write!(io::stderr(), "\rrestoring: {percent:3} % of {of} rows");
        }
    }

    fn end(&self) {
        if self.percent.is_some() {
            let _ = writeln!(io::stderr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_has_to_be_where_its_cluster_says() {
        let three = cluster("a=http://h:1,b=http://h:2,a=http://h:3").unwrap();
        assert_eq!(three.len(), 2);
        check_cluster("a", &three, "http://h:3,http://h:1").unwrap();
        check_cluster("b", &three, "http://h:2").unwrap();
        for (name, advertised, text) in [
            ("c", "http://h:1", "couldn't find local name \"c\""),
            ("a", "http://h:1", "has a=http://h:3 but missing"),
            ("b", "http://h:2,http://h:4", "has http://h:4 but missing"),
            ("b", "h:2", "--initial-advertise-peer-urls=h:2"),
        ] {
            let failure = check_cluster(name, &three, advertised).unwrap_err();
            assert!(failure.message.contains(text), "{}", failure.message);
        }
        for wrong in ["", "a", "=http://h:1", "a=h:1", "a=http://h:1,b=http://h:1"] {
            assert!(cluster(wrong).is_err(), "{wrong}");
        }
    }
}
