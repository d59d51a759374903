//! Asking the others who belongs to the cluster, before a new member makes its data.
//!
//! ```text
//! new        each peer is asked once, all at a time      none answers: usual, go on
//! existing   the same, again and again                   none answers: refuse to start
//! ```
//!
//! One that joins is not content with what a member remembers, which may lag behind: a
//! majority has to agree, as it had when the member was added.
//!
//! A member of a new cluster asks lest it was in the cluster before and has lost its data;
//! one that joins gets its id from the answer. A member whose directory holds data asks
//! nobody.
//!
//! The others' ports refuse while they are not there, which takes no time. A port that
//! accepts and does not answer costs `NEW_TIMEOUT`. So a member asks *before* it binds
//! its own peer listeners: else all members of a new cluster, started at once, would wait
//! for each other's answers.

use std::error::Error;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;

use crate::pb::kvorumpb::peer_client::PeerClient;
use crate::pb::kvorumpb::{MembersRequest, MembersResponse};

/// Time a peer has to answer a member of a new cluster; etcd's value.
const NEW_TIMEOUT: Duration = Duration::from_secs(1);
/// Time a peer has to answer a member that joins, in one attempt; etcd's value.
const EXISTING_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before the peers are asked again.
const PAUSE: Duration = Duration::from_millis(250);
/// No attempt begins later than this after the first.
const ATTEMPTS_FOR: Duration = Duration::from_secs(30);

/// Makes the channel to a peer URL, which connects with its first call. The error names the
/// URL.
pub type Connect<E> = dyn Fn(&str) -> Result<Channel, E> + Send + Sync;

/// No peer has told the members.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot fetch cluster info from peer urls: could not retrieve cluster information from the \
     given URLs: {}; start the other members, or correct --initial-cluster and the flags \
     --peer-* for TLS", .0.join("; ")
)]
pub struct NobodyAnswered(
    /// Each URL, and why it did not.
    pub Vec<String>,
);

/// Asks for a member of a new cluster. `None` when nobody answers, which is usual. Takes
/// `NEW_TIMEOUT` at most. Dropping the future ends the calls.
pub async fn when_new<E: Error>(
    peer_urls: &[String],
    connect: &Connect<E>,
) -> Option<MembersResponse> {
    match ask(peer_urls, connect, false, NEW_TIMEOUT).await {
        Ok(answer) => Some(answer),
        Err(errors) => {
            tracing::debug!(?errors, "no peer has answered");
            None
        }
    }
}

/// Asks for a member that joins, until somebody answers. Dropping the future ends the calls.
///
/// # Errors
/// Nobody did, for `ATTEMPTS_FOR` and one attempt.
pub async fn when_joining<E: Error>(
    peer_urls: &[String],
    connect: &Connect<E>,
) -> Result<MembersResponse, NobodyAnswered> {
    let began = Instant::now();
    loop {
        let errors = match ask(peer_urls, connect, true, EXISTING_TIMEOUT).await {
            Ok(answer) => return Ok(answer),
            Err(errors) => errors,
        };
        // Without peers there is nothing to wait for.
        if peer_urls.is_empty() || began.elapsed() >= ATTEMPTS_FOR {
            return Err(NobodyAnswered(errors));
        }
        for error in &errors {
            tracing::warn!(error, "failed to get cluster response");
        }
        sleep(PAUSE).await;
    }
}

/// The first answer of any of the peers, or why each did not.
pub(super) async fn ask<E: Error>(
    peer_urls: &[String],
    connect: &Connect<E>,
    linearizable: bool,
    patience: Duration,
) -> Result<MembersResponse, Vec<String>> {
    let mut errors = Vec::new();
    let mut calls = JoinSet::new();
    for url in peer_urls {
        match connect(url) {
            Ok(channel) => {
                let call = ask_one(channel, linearizable, patience);
                let url = url.clone();
                calls.spawn(async move { call.await.map_err(|error| format!("{url}: {error}")) });
            }
            Err(error) => errors.push(with_causes(&error)),
        }
    }
    while let Some(ended) = calls.join_next().await {
        match ended {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => errors.push(error),
            Err(error) => errors.push(error.to_string()),
        }
    }
    Err(errors)
}

async fn ask_one(
    channel: Channel,
    linearizable: bool,
    patience: Duration,
) -> Result<MembersResponse, String> {
    let mut peer = PeerClient::new(channel);
    let answer = match timeout(patience, peer.members(MembersRequest { linearizable })).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return Err(with_causes(&status)),
        Err(_) => return Err(format!("no answer within {patience:?}")),
    };
    // One that is about to join itself knows nobody yet.
    if answer.members.is_empty() {
        return Err("failed to get raft cluster member(s) from the given URLs".to_owned());
    }
    Ok(answer)
}

/// The error with what led to it, for tonic says "transport error" of them all.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::routing::post;
    use bytes::Bytes;
    use http_body_util::{BodyExt as _, Full};
    use prost::Message as _;
    use tonic::transport::{Endpoint, Uri};

    use super::*;
    use crate::pb::kvorumpb::MemberRecord;

    /// How a peer of a test takes the question.
    #[derive(Clone)]
    enum Peer {
        Answers(MembersResponse),
        Silent,
        Refuses,
        NoUrl,
    }

    fn connect(
        peer: impl Fn(&str) -> Peer + Send + Sync,
    ) -> impl Fn(&str) -> Result<Channel, io::Error> + Send + Sync {
        move |url: &str| match peer(url) {
            Peer::Answers(answer) => Ok(channel(Some(answer))),
            Peer::Silent => Ok(channel(None)),
            Peer::Refuses => {
                let refused = |_: Uri| async { Err::<Never, _>(io::Error::other("refused")) };
                let refuses = tower::service_fn(refused);
                Ok(Endpoint::from_static("http://peer").connect_with_connector_lazy(refuses))
            }
            Peer::NoUrl => Err(io::Error::other(format!("{url} is none"))),
        }
    }

    /// The connection that there never is.
    type Never = hyper_util::rt::TokioIo<tokio::io::DuplexStream>;

    fn channel(answer: Option<MembersResponse>) -> Channel {
        let answers = move || async move {
            let Some(answer) = answer else { return std::future::pending().await };
            let mut frame = vec![0];
            frame.extend_from_slice(&(answer.encoded_len() as u32).to_be_bytes());
            answer.encode(&mut frame).expect("a vector grows");
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
            let body =
                Full::new(Bytes::from(frame)).with_trailers(std::future::ready(Some(Ok(trailers))));
            let response = http::Response::builder().header("content-type", "application/grpc");
            response.body(axum::body::Body::new(body)).expect("a response")
        };
        let router = axum::Router::new().route("/kvorumpb.Peer/Members", post(answers));
        crate::api::in_process_channel(router)
    }

    fn cluster(id: u64) -> MembersResponse {
        let members = vec![MemberRecord { id: 1, ..MemberRecord::default() }];
        MembersResponse { cluster_id: id, members }
    }

    fn urls(urls: &[&str]) -> Vec<String> {
        urls.iter().map(|url| (*url).to_owned()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn one_answer_is_enough() {
        let connect = connect(|url| match url {
            "a" => Peer::Silent,
            "b" => Peer::Refuses,
            "c" => Peer::NoUrl,
            "d" => Peer::Answers(MembersResponse::default()),
            _ => Peer::Answers(cluster(7)),
        });
        let urls = urls(&["a", "b", "c", "d", "e"]);
        assert_eq!(when_new(&urls, &connect).await, Some(cluster(7)));
        assert_eq!(when_joining(&urls, &connect).await.expect("an answer"), cluster(7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_cluster_waits_for_nobody_who_refuses() {
        let began = Instant::now();
        let connect = connect(|_| Peer::Refuses);
        assert_eq!(when_new(&urls(&["a", "b"]), &connect).await, None);
        assert_eq!(when_new(&[], &connect).await, None);
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_cluster_waits_a_second_for_all_who_are_silent() {
        let began = Instant::now();
        let connect = connect(|_| Peer::Silent);
        assert_eq!(when_new(&urls(&["a", "b", "c"]), &connect).await, None);
        let took = began.elapsed();
        assert!(took >= NEW_TIMEOUT && took < 2 * NEW_TIMEOUT, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_joins_asks_until_there_is_an_answer() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let connect = connect(move |_| match counted.fetch_add(1, Ordering::Relaxed) {
            0..3 => Peer::Refuses,
            _ => Peer::Answers(cluster(7)),
        });
        let answer = when_joining(&urls(&["a"]), &connect).await.expect("an answer");
        assert_eq!((answer, asked.load(Ordering::Relaxed)), (cluster(7), 4));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_joins_gives_up_and_says_whom_it_asked() {
        let began = Instant::now();
        let connect = connect(|url| if url == "http://a:1" { Peer::Refuses } else { Peer::NoUrl });
        let urls = urls(&["http://a:1", "http://b:1"]);
        let error = when_joining(&urls, &connect).await.expect_err("nobody answers").to_string();
        assert!(began.elapsed() >= ATTEMPTS_FOR);
        assert!(error.contains("could not retrieve cluster information from the given URLs"));
        assert!(error.contains("http://a:1: ") && error.contains("refused"), "{error}");
        assert!(error.contains("http://b:1 is none"), "{error}");
    }
}
