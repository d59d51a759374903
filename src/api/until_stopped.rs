//! The end of streams that would never end by themselves.
//!
//! A client that keeps a lease alive or watches the server's health leaves its stream
//! open. When the server stops it would wait for these streams; instead they end, with
//! what makes etcd's clients go on elsewhere.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::Status;

use super::status::status;
use crate::error::Error;

/// A stream until the server stops.
pub(super) struct UntilStopped<S> {
    stream: S,
    /// `None` once the stream has ended.
    stopping: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl<S> UntilStopped<S> {
    /// `stopping` becomes true when the server begins to stop.
    pub(super) fn new(stream: S, mut stopping: watch::Receiver<bool>) -> UntilStopped<S> {
        let stopping = async move {
            // Without its sender the server is gone.
            let _ = stopping.wait_for(|stopping| *stopping).await;
        };
        UntilStopped { stream, stopping: Some(Box::pin(stopping)) }
    }
}

impl<T, S: Stream<Item = Result<T, Status>> + Unpin> Stream for UntilStopped<S> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(stopping) = &mut self.stopping else { return Poll::Ready(None) };
        if stopping.as_mut().poll(context).is_ready() {
            self.stopping = None;
            return Poll::Ready(Some(Err(status(Error::Stopped))));
        }
        Pin::new(&mut self.stream).poll_next(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn a_stream_ends_when_it_does_or_when_the_server_stops() {
        let (stop, stopping) = watch::channel(false);
        let items = tokio_stream::iter([Ok(1), Ok(2)]);
        let mut stream = UntilStopped::new(items, stopping.clone());
        assert!(matches!(stream.next().await, Some(Ok(1))));
        assert!(matches!(stream.next().await, Some(Ok(2))));
        assert!(stream.next().await.is_none());

        let never = tokio_stream::pending::<Result<u8, Status>>();
        let mut stream = UntilStopped::new(never, stopping);
        let (end, ()) = tokio::join!(stream.next(), async {
            tokio::task::yield_now().await;
            stop.send_replace(true);
        });
        assert_eq!(end.unwrap().unwrap_err().code(), tonic::Code::Unavailable);
        assert!(stream.next().await.is_none());
    }
}
