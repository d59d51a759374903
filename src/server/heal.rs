//! A member whose checkpoint is damaged fetches its state from a peer before it starts.
//!
//! ```text
//! open ─ fine ───────────────────────────────────────────────▶ start
//!   └─ the checkpoint is damaged ─▶ who is in the cluster?      ▲
//!           any peer that answers, by the addresses left over   │
//!        ─▶ each member in turn: its image, please ─▶ in place ─┘
//!        ─▶ nobody has one, for HEAL_FOR: refuse to start
//! ```
//!
//! Why that is safe is in [`crate::runtime::heal`]. Asking happens before this member binds its peer
//! port or takes part in raft. The peers need no leader to answer, only to run: when a whole
//! cluster is started, they wait for each other's votes and answer meanwhile. Whether a peer's state goes
//! far enough may depend on entries that are yet to be committed, hence more than one attempt.
//!
//! One that nobody helps ends, and says whom it asked. Its supervisor may start it again: nothing
//! was changed.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{StartError, discover};
use crate::net::identity::{Caller, Identity};
use crate::net::pull::{PullError, Pulled, pull};
use crate::net::{Connector, refusal};
use crate::pb::kvorumpb::peer_client::PeerClient;
use crate::runtime::fault::Fatal;
use crate::runtime::heal::{Damage, ReplaceError};
use crate::runtime::recover::{self, Bootstrap, OpenError, Place, Recovery};
use crate::storage::spool::Spools;

/// No attempt begins later than this after the first.
const HEAL_FOR: Duration = Duration::from_secs(60);
/// Pause before the peers are asked again.
const PAUSE: Duration = Duration::from_secs(1);
/// Time a peer has to say who is in the cluster.
const MEMBERS_TIMEOUT: Duration = Duration::from_secs(5);

/// The checkpoint is damaged, and no peer has given this member another.
#[derive(Debug, thiserror::Error)]
#[error(
    "{what}. Its raft log is intact, and with a copy of the state from another member this one \
     could go on; none gave it one within {} s: {}. Start the other members, correct what they say, \
     and start this member again: nothing was changed. If they are lost, restore a snapshot for all \
     members: `kvorum snapshot restore <file> --data-dir <empty directory>`",
    HEAL_FOR.as_secs(), errors.join("; ")
)]
pub struct NotHealed {
    /// What is damaged.
    what: String,
    /// Each peer, and why it did not.
    errors: Vec<String>,
}

/// Reads a member back, or makes a new one, as [`recover::open`] does; if its checkpoint is
/// damaged, has it replaced first. Dropping the future gives up; what the disk is doing is
/// finished.
///
/// # Errors
/// Like [`recover::open`], and [`NotHealed`].
pub(super) async fn open(
    place: Place,
    bootstrap: Bootstrap,
    connector: &Connector,
) -> Result<Recovery, StartError> {
    let opened = open_once(&place, &bootstrap).await?;
    let error = match opened {
        Ok(recovery) => return Ok(recovery),
        Err(error) => error,
    };
    let mut damage = {
        let (place, bootstrap) = (place.clone(), bootstrap.clone());
        blocking(move || Damage::examine(&place, &bootstrap, error)).await??
    };
    tracing::error!(error = damage.what(), "the checkpoint is damaged");
    if damage.peer_urls().is_empty() {
        let bootstrap = bootstrap.clone();
        blocking(move || damage.rebuild(&bootstrap)).await??;
        tracing::warn!("the state is built from the raft log, which has all of it");
    } else {
        damage = from_a_peer(damage, connector).await?;
        // With it goes the lock on the directory.
        drop(damage);
    }
    Ok(open_once(&place, &bootstrap).await??)
}

async fn open_once(
    place: &Place,
    bootstrap: &Bootstrap,
) -> Result<Result<Recovery, OpenError>, Fatal> {
    let (place, bootstrap) = (place.clone(), bootstrap.clone());
    blocking(move || recover::open(&place, &bootstrap)).await
}

/// Asks until a peer's image is in the place of the damaged checkpoint.
async fn from_a_peer(mut damage: Damage, connector: &Connector) -> Result<Damage, StartError> {
    let began = Instant::now();
    loop {
        let (back, errors) = match attempt(damage, connector).await? {
            Ok(damage) => return Ok(damage),
            Err(failed) => failed,
        };
        damage = back;
        for error in &errors.texts {
            tracing::warn!(error, "no state to go on from");
        }
        if errors.are_final || began.elapsed() >= HEAL_FOR {
            return Err(NotHealed { what: damage.what().to_owned(), errors: errors.texts }.into());
        }
        sleep(PAUSE).await;
    }
}

/// Why an attempt was in vain.
#[derive(Default)]
struct Errors {
    texts: Vec<String>,
    /// Asking again is of no use.
    are_final: bool,
}

/// One attempt at all peers.
async fn attempt(
    mut damage: Damage,
    connector: &Connector,
) -> Result<Result<Damage, (Damage, Errors)>, StartError> {
    let mut errors = Errors::default();
    let spools = damage.spools().map_err(StartError::Snapshots)?;
    let own = damage.identity();
    let asked = discover::ask(damage.peer_urls(), &**connector, false, MEMBERS_TIMEOUT).await;
    let cluster = match asked {
        Ok(cluster) => cluster,
        Err(texts) => return Ok(Err((damage, Errors { texts, are_final: false }))),
    };
    if cluster.cluster_id != own.cluster_id {
        errors.texts.push(format!(
            "they belong to cluster {:x}, and this member to {:x}",
            cluster.cluster_id, own.cluster_id
        ));
        return Ok(Err((damage, errors)));
    }
    for peer in cluster.members.iter().filter(|peer| peer.id != own.member_id) {
        for url in &peer.peer_urls {
            let pulled = match pull_from(&damage, peer.id, url, connector, &spools).await {
                Ok(pulled) => pulled,
                Err(Refused { text, is_final }) => {
                    errors.texts.push(text);
                    errors.are_final |= is_final;
                    continue;
                }
            };
            let index = pulled.index;
            let (back, replaced) = blocking(move || {
                let replaced = damage.replace(pulled);
                (damage, replaced)
            })
            .await?;
            damage = back;
            match replaced {
                Ok(()) => {
                    let member = format!("{:x}", peer.id);
                    tracing::warn!(member, url, index, "the state is another member's now");
                    return Ok(Ok(damage));
                }
                Err(ReplaceError::Open(error)) => return Err(error.into()),
                Err(error) => errors.texts.push(format!("{url}: {error}")),
            }
        }
    }
    if errors.texts.is_empty() {
        errors.texts.push(format!("{} know no other member", damage.peer_urls().join(", ")));
    }
    Ok(Err((damage, errors)))
}

struct Refused {
    text: String,
    is_final: bool,
}

async fn pull_from(
    damage: &Damage,
    peer: u64,
    url: &str,
    connector: &Connector,
    spools: &Spools,
) -> Result<Pulled, Refused> {
    let text = |error: &dyn std::fmt::Display| format!("{url}: {error}");
    let channel = connector(url).map_err(|e| Refused { text: e.to_string(), is_final: false })?;
    let own = damage.identity();
    let own = Identity { cluster_id: own.cluster_id, member_id: own.member_id };
    let client = PeerClient::with_interceptor(channel, Caller::new(own, peer));
    tracing::info!(url, at_least = damage.at_least(), "asking a peer for its state");
    pull(client, damage.at_least(), spools, &damage.has_room()).await.map_err(|error| {
        let is_final = matches!(&error, PullError::Refused(why) if refusal::is_removed(why));
        Refused { text: text(&error), is_final }
    })
}

/// Does what blocks on the disk where that is allowed.
async fn blocking<R: Send + 'static>(
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, Fatal> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Fatal::new(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;
    use std::sync::Arc;

    use tonic::transport::{Endpoint, Uri};

    use super::*;
    use crate::net::BadUrl;

    /// The connection that there never is.
    type Never = hyper_util::rt::TokioIo<tokio::io::DuplexStream>;

    #[tokio::test(start_paused = true)]
    async fn one_that_nobody_helps_says_whom_it_asked_and_changes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let names = [("a", "http://127.0.0.1:1"), ("b", "http://b.test:2"), ("c", "nonsense")];
        let initial = names.map(|(name, url)| (name.to_owned(), vec![url.to_owned()]));
        let bootstrap = Bootstrap {
            initial_cluster: initial.into(),
            name: "a".to_owned(),
            cluster_version: "3.7.0".to_owned(),
            ..Bootstrap::default()
        };
        let place = Place::Disk { data_dir: dir.path().to_owned(), wal_dir: None, fsync: false };
        drop(recover::open(&place, &bootstrap).expect("it is made"));
        fs::remove_dir_all(dir.path().join("member/ckpt-1")).expect("is there");
        let connector: Connector = Arc::new(|url: &str| match url {
            "nonsense" => Err(BadUrl { url: url.to_owned(), reason: "it is none".to_owned() }),
            _ => {
                let refused = |_: Uri| async { Err::<Never, _>(io::Error::other("refused")) };
                let refuses = tower::service_fn(refused);
                Ok(Endpoint::from_static("http://peer").connect_with_connector_lazy(refuses))
            }
        });
        let began = Instant::now();
        let error = open(place, bootstrap, &connector).await.err().expect("nobody helps");
        assert!(began.elapsed() >= HEAL_FOR);
        let error = error.to_string();
        for words in [
            "ckpt-1 is damaged",
            "it is missing",
            "http://b.test:2: ",
            "refused",
            "cannot connect to nonsense: it is none",
            "Start the other members",
            "kvorum snapshot restore",
        ] {
            assert!(error.contains(words), "{words:?} is not in {error}");
        }
        let current = fs::read_to_string(dir.path().join("member/CURRENT")).expect("is there");
        assert!(current.starts_with("ckpt-1\n"), "{current}");
    }
}
