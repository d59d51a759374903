//! The Lock service: mutual exclusion in a queue of keys (see [`super::concurrency`]).
//!
//! The lock is the key `<name>/<lease in hexadecimal>` and is held as long as that
//! key exists: until `Unlock` deletes it or its lease ends. A call without a lease
//! gets one of 60 seconds that nobody renews, as in etcd, so such a lock is for
//! short work. A client that goes away while it waits leaves the queue.

use tonic::{Request, Response, Status};

use super::concurrency::{Failure, Queue, Session, enter, first_kv, get, read_kv};
use super::status::unknown;
use crate::engine::Engine;
use crate::pb::etcdserverpb::DeleteRangeRequest;
use crate::pb::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse, lock_server};

pub(super) struct Lock {
    engine: Engine,
}

impl Lock {
    pub(super) fn new(engine: Engine) -> Lock {
        Lock { engine }
    }

    async fn acquire(&self, request: LockRequest) -> Result<LockResponse, Failure> {
        let mut session = Session::open(&self.engine, request.lease).await?;
        match self.wait(&Queue::new(&request.name), &mut session).await {
            Ok(response) => {
                session.keep();
                Ok(response)
            }
            Err(failure) => {
                session.leave().await;
                Err(failure)
            }
        }
    }

    async fn wait(&self, queue: &Queue, session: &mut Session) -> Result<LockResponse, Failure> {
        let key = queue.key(session.lease());
        let txn = enter(&key, Default::default(), session.lease(), Some(queue.oldest()));
        let entered = self.engine.txn(txn).await?;
        // The key is either new, as of this transaction, or of an earlier call.
        let created = match read_kv(&entered, 0)? {
            Some(own) => own.create_revision,
            None => entered.header.as_ref().map_or(0, |header| header.revision),
        };
        session.entered(key.clone(), created);
        let holder = read_kv(&entered, 1)?;
        if holder.is_none_or(|holder| holder.create_revision == created) {
            return Ok(LockResponse { header: entered.header, key });
        }
        queue.wait_for_deletes(&self.engine, created - 1).await?;
        // The lease may have ended while others held the lock.
        let own = self.engine.range(get(&key)).await?;
        match first_kv(&own)? {
            Some(_) => Ok(LockResponse { header: own.header, key }),
            None => Err(Failure::SessionExpired),
        }
    }
}

#[tonic::async_trait]
impl lock_server::Lock for Lock {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        self.acquire(request.into_inner()).await.map(Response::new).map_err(unknown)
    }

    async fn unlock(
        &self,
        request: Request<UnlockRequest>,
    ) -> Result<Response<UnlockResponse>, Status> {
        let key = request.into_inner().key;
        let delete = DeleteRangeRequest { key, ..DeleteRangeRequest::default() };
        let response = self.engine.delete_range(delete).await.map_err(unknown)?;
        Ok(Response::new(UnlockResponse { header: response.header }))
    }
}
