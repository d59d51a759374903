//! The Election service: leadership in a queue of keys (see [`super::concurrency`]).
//!
//! The leader is whose key is the oldest under `<name>/`; its value is what the
//! leader proclaims. `Campaign` waits until the caller's key is the oldest,
//! `Observe` follows the present leader's value and then the next leader's.
//!
//! As in etcd a campaign without a lease gets one of 60 seconds that nobody
//! renews, and a campaign that waited does not look whether its own key is still
//! there: a client that needs to be sure compares `rev` when it acts as leader.

use std::pin::Pin;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::concurrency::{
    Failure, Queue, Session, Watcher, delete_if, enter, first_kv, put_if, read_kv, revision,
};
use super::status::unknown;
use crate::engine::Engine;
use crate::pb::etcdserverpb::{ResponseHeader, WatchCreateRequest};
use crate::pb::mvccpb;
use crate::pb::v3electionpb::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
    ProclaimResponse, ResignRequest, ResignResponse, election_server,
};

/// Leader values an observer may be behind before the watch that feeds it waits.
const OBSERVED_VALUES: usize = 16;

pub(super) struct Election {
    engine: Engine,
}

impl Election {
    pub(super) fn new(engine: Engine) -> Election {
        Election { engine }
    }

    async fn stand(&self, request: CampaignRequest) -> Result<CampaignResponse, Failure> {
        let mut session = Session::open(&self.engine, request.lease).await?;
        let queue = Queue::new(&request.name);
        let lease = session.lease();
        let key = queue.key(lease);
        let txn = enter(&key, request.value.clone(), lease, None);
        let entered = match self.engine.txn(txn).await {
            Ok(entered) => entered,
            Err(error) => {
                session.leave().await;
                return Err(error.into());
            }
        };
        let own = read_kv(&entered, 0)?;
        let rev = match &own {
            Some(own) => own.create_revision,
            None => entered.header.as_ref().map_or(0, |header| header.revision),
        };
        session.entered(key.clone(), rev);
        let leader = LeaderKey { name: request.name, key, rev, lease };
        // The session campaigns already: then this call changes its value.
        if own.is_some_and(|own| own.value != request.value)
            && let Err(failure) = self.announce(&leader, lease, request.value).await
        {
            session.leave().await;
            return Err(failure);
        }
        if let Err(failure) = queue.wait_for_deletes(&self.engine, rev - 1).await {
            // The candidate of a client's own lease keeps its place for the next try.
            session.leave_if_granted().await;
            return Err(failure);
        }
        session.keep();
        Ok(CampaignResponse { header: entered.header, leader: Some(leader) })
    }

    async fn announce(
        &self,
        leader: &LeaderKey,
        lease: i64,
        value: Bytes,
    ) -> Result<Option<ResponseHeader>, Failure> {
        let response = self.engine.txn(put_if(&leader.key, leader.rev, value, lease)).await?;
        if response.succeeded { Ok(response.header) } else { Err(Failure::NotLeader) }
    }

    async fn say(&self, request: ProclaimRequest) -> Result<ProclaimResponse, Failure> {
        let leader = request.leader.ok_or(Failure::MissingLeaderKey)?;
        let session = Session::open(&self.engine, leader.lease).await?;
        match self.announce(&leader, session.lease(), request.value).await {
            Ok(header) => {
                session.keep();
                Ok(ProclaimResponse { header })
            }
            Err(failure) => {
                session.leave().await;
                Err(failure)
            }
        }
    }

    async fn step_down(&self, request: ResignRequest) -> Result<ResignResponse, Failure> {
        let leader = request.leader.ok_or(Failure::MissingLeaderKey)?;
        let response = self.engine.txn(delete_if(leader.key, leader.rev)).await?;
        Ok(ResignResponse { header: response.header })
    }

    async fn current(&self, request: LeaderRequest) -> Result<LeaderResponse, Failure> {
        let response = self.engine.range(Queue::new(&request.name).oldest()).await?;
        let kv = first_kv(&response)?.ok_or(Failure::NoLeader)?;
        Ok(LeaderResponse { header: response.header, kv: Some(kv) })
    }
}

#[tonic::async_trait]
impl election_server::Election for Election {
    async fn campaign(
        &self,
        request: Request<CampaignRequest>,
    ) -> Result<Response<CampaignResponse>, Status> {
        self.stand(request.into_inner()).await.map(Response::new).map_err(unknown)
    }

    async fn proclaim(
        &self,
        request: Request<ProclaimRequest>,
    ) -> Result<Response<ProclaimResponse>, Status> {
        self.say(request.into_inner()).await.map(Response::new).map_err(unknown)
    }

    async fn leader(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<LeaderResponse>, Status> {
        self.current(request.into_inner()).await.map(Response::new).map_err(unknown)
    }

    type ObserveStream = Pin<Box<dyn Stream<Item = Result<LeaderResponse, Status>> + Send>>;

    async fn observe(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let (values, stream) = mpsc::channel(OBSERVED_VALUES);
        let queue = Queue::new(&request.into_inner().name);
        let engine = self.engine.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = values.closed() => {}
                failure = observe(&engine, &queue, &values) => {
                    // Nobody listens any more: then nobody misses it.
                    if let Err(failure) = failure {
                        let _ = values.send(Err(unknown(failure))).await;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn resign(
        &self,
        request: Request<ResignRequest>,
    ) -> Result<Response<ResignResponse>, Status> {
        self.step_down(request.into_inner()).await.map(Response::new).map_err(unknown)
    }
}

/// Where [`observe`] sends what it sees.
type Values = mpsc::Sender<Result<LeaderResponse, Status>>;

/// Sends the leader's values, one leader after the other, until nobody listens.
async fn observe(engine: &Engine, queue: &Queue, values: &Values) -> Result<(), Failure> {
    loop {
        let response = engine.range(queue.oldest()).await?;
        let (header, kv) = match first_kv(&response)? {
            Some(kv) => (response.header, kv),
            None => match first_put(engine, queue, revision(&response)).await? {
                Some(first) => first,
                None => continue,
            },
        };
        let key = kv.key.clone();
        let start = header.as_ref().map_or(0, |header| header.revision) + 1;
        if values.send(Ok(LeaderResponse { header, kv: Some(kv) })).await.is_err() {
            return Ok(());
        }
        let create =
            WatchCreateRequest { key, start_revision: start, ..WatchCreateRequest::default() };
        let mut watch = Watcher::open(engine, create).await?;
        // Ends when the leader's key is deleted, or when the watch has to start anew.
        'leader: while let Some(response) = watch.next().await? {
            for event in response.events {
                let event = mvccpb::Event::decode(event)?;
                if event.r#type() == mvccpb::event::EventType::Delete {
                    break 'leader;
                }
                let value = LeaderResponse { header: response.header, kv: event.kv };
                if values.send(Ok(value)).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// Waits for the first key of a queue; `None` when the wait has to start anew.
/// The header's revision is the key's: others may have come with it.
async fn first_put(
    engine: &Engine,
    queue: &Queue,
    start_revision: i64,
) -> Result<Option<(Option<ResponseHeader>, mvccpb::KeyValue)>, Failure> {
    let mut watch = Watcher::open(engine, queue.puts(start_revision)).await?;
    while let Some(response) = watch.next().await? {
        let Some(event) = response.events.into_iter().next() else { continue };
        let kv = mvccpb::Event::decode(event)?.kv.unwrap_or_default();
        let header =
            response.header.map(|header| ResponseHeader { revision: kv.mod_revision, ..header });
        return Ok(Some((header, kv)));
    }
    Ok(None)
}
