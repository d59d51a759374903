//! Writes that wait for each other: one call of the system for many answers.
//!
//! Answers that become ready together, those of one raft batch or of many keepalives, are
//! written by the task of their connection, which wakes for the first of them. Flushing at
//! once would send each by itself. So the first flush lets the other tasks run that are
//! ready, once, and what they answer goes along; where there are none, nothing is lost.
//! gRPC's transport in Go, and so etcd, does the same (`loopyWriter.run` in
//! internal/transport/controlbuf.go yields when it has little to write).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is gathered at most, in bytes. More than that is written without waiting, and
/// without being copied.
const GATHERED_BYTES_MAX: usize = 16 << 10;

/// A stream that gathers small writes until the tasks that are ready have run.
pub(super) struct Gather<S> {
    stream: S,
    gathered: BytesMut,
    /// The others have had their turn since the last flush.
    yielded: bool,
}

impl<S: AsyncWrite + Unpin> Gather<S> {
    pub(super) fn new(stream: S) -> Gather<S> {
        Gather { stream, gathered: BytesMut::new(), yielded: false }
    }

    /// Writes what was gathered.
    fn poll_write_gathered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.gathered))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gathered.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    fn has_space_for(&self, length: usize) -> bool {
        self.gathered.len().saturating_add(length) <= GATHERED_BYTES_MAX
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gather<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gather<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.has_space_for(buf.len()) {
            self.gathered.extend_from_slice(buf);
            return Poll::Ready(Ok(buf.len()));
        }
        ready!(self.poll_write_gathered(cx))?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = bufs.iter().map(|buf| buf.len()).sum();
        if self.has_space_for(length) {
            bufs.iter().for_each(|buf| self.gathered.extend_from_slice(buf));
            return Poll::Ready(Ok(length));
        }
        ready!(self.poll_write_gathered(cx))?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.gathered.is_empty() && !self.yielded {
            self.yielded = true;
            // Behind those that are ready: a task that wakes itself goes to the back.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.poll_write_gathered(cx))?;
        self.yielded = false;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_gathered(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Notes each write that reaches it, and takes no more than `room` at a time.
    #[derive(Default)]
    struct Wire {
        writes: Vec<Vec<u8>>,
        room: usize,
    }

    impl AsyncWrite for Wire {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = buf.len().min(self.room);
            self.writes.push(buf[..taken].to_vec());
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    async fn flush_once(stream: &mut Gather<Wire>) -> bool {
        poll_fn(|cx| Poll::Ready(Pin::new(&mut *stream).poll_flush(cx).is_ready())).await
    }

    #[tokio::test]
    async fn what_is_written_before_the_flush_has_yielded_goes_along() {
        let mut stream = Gather::new(Wire { room: usize::MAX, ..Wire::default() });
        stream.write_all(b"a").await.unwrap();
        assert!(!flush_once(&mut stream).await, "the others first");
        stream.write_all(b"b").await.unwrap();
        assert!(flush_once(&mut stream).await, "they have had their turn");
        assert_eq!(stream.stream.writes, [b"ab".to_vec()]);
        assert!(flush_once(&mut stream).await, "there is nothing to wait with");
        stream.write_all(b"c").await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(stream.stream.writes, [b"ab".to_vec(), b"c".to_vec()]);
    }

    #[tokio::test]
    async fn large_writes_go_out_at_once_and_in_order() {
        let mut stream = Gather::new(Wire { room: 10_000, ..Wire::default() });
        let large = vec![2; GATHERED_BYTES_MAX];
        stream.write_all(&[1; 100]).await.unwrap();
        stream.write_all(&large).await.unwrap();
        assert!(!stream.stream.writes.is_empty(), "no room for both");
        stream.shutdown().await.unwrap();
        let written = stream.stream.writes.concat();
        assert_eq!(written, [vec![1; 100], large].concat());
    }

    #[tokio::test]
    async fn a_closed_wire_is_an_error() {
        let mut stream = Gather::new(Wire::default());
        stream.write_all(b"a").await.unwrap();
        let error = stream.flush().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
    }

    #[tokio::test]
    async fn reads_pass() {
        let (near, mut far) = tokio::io::duplex(64);
        far.write_all(b"hello").await.unwrap();
        let mut read = [0; 5];
        Gather::new(near).read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello");
    }
}
