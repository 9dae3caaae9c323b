//! Who is still there. A client that has sent its whole request may close its side of the connection and read on; one that is gone
//! looks the same: either way the stream that it sends has ended. Only sending tells them apart, since the system of a client that is
//! gone answers with a reset, and sending after that fails. A streamed answer sends by itself. For any other, once the client's side has
//! ended, interim responses are sent (RFC 9110, section 15.2: every client of HTTP/1.1 must read them, and may ignore them).

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// When they are sent, after the end of what the client sends: the first brings the reset, the second meets it, the others find
/// clients that go later. Some clients refuse more than five of them.
const TIMES: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(250),
    Duration::from_secs(5),
    Duration::from_secs(60),
];

/// Whether a request has been read whole and nothing of its answer has been made. Shared by the stream and the service on it,
/// which run in one task.
#[derive(Clone, Default)]
pub(crate) struct Working(Arc<AtomicBool>);

impl Working {
    pub(crate) fn set(&self, works: bool) {
        self.0.store(works, Ordering::Relaxed);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A stream that breaks while a request is worked on whose client is gone.
///
/// A connection that reads whole requests does not read while it waits for an answer, but it flushes each time it is asked: that is
/// where this looks. It then has nothing of its own to write.
pub(crate) struct Probe<S> {
    stream: S,
    working: Working,
    /// What came behind the request: nothing after it is looked at.
    ahead: Option<u8>,
    ended: Option<Instant>,
    sent: usize,
    timer: Option<Pin<Box<Sleep>>>,
    /// The rest of an interim response.
    left: &'static [u8],
}

impl<S: AsyncRead + AsyncWrite + Unpin> Probe<S> {
    pub(crate) fn new(stream: S, working: Working) -> Self {
        Probe {
            stream,
            working,
            ahead: None,
            ended: None,
            sent: 0,
            timer: None,
            left: &[],
        }
    }

    /// Looks for the end of what the client sends, or a reset.
    fn look(&mut self, context: &mut Context) -> Result<()> {
        if self.ended.is_some() || self.ahead.is_some() {
            return Ok(());
        }
        let mut byte = [0];
        let mut buffer = ReadBuf::new(&mut byte);
        match Pin::new(&mut self.stream).poll_read(context, &mut buffer) {
            Poll::Pending => {}
            Poll::Ready(Ok(())) => match buffer.filled() {
                [byte] => self.ahead = Some(*byte),
                _ => self.ended = Some(Instant::now()),
            },
            // TLS that ends without saying so.
            Poll::Ready(Err(error)) if error.kind() == ErrorKind::UnexpectedEof => {
                self.ended = Some(Instant::now());
            }
            Poll::Ready(Err(error)) => return Err(error),
        }
        Ok(())
    }

    /// Begins the interim responses whose time has come.
    fn probe(&mut self, context: &mut Context) -> Poll<Result<()>> {
        while let (Some(ended), Some(after)) = (self.ended, TIMES.get(self.sent)) {
            let timer = self
                .timer
                .get_or_insert_with(|| Box::pin(sleep_until(ended + *after)));
            if timer.as_mut().poll(context).is_pending() {
                break;
            }
            self.timer = None;
            self.sent += 1;
            self.left = INTERIM;
            ready!(self.write_left(context))?;
            ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        }
        Poll::Ready(Ok(()))
    }

    fn write_left(&mut self, context: &mut Context) -> Poll<Result<()>> {
        while !self.left.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(context, self.left))?;
            if written == 0 {
                return Poll::Ready(Err(Error::from(ErrorKind::WriteZero)));
            }
            self.left = &self.left[written..];
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Probe<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        buffer: &mut ReadBuf,
    ) -> Poll<Result<()>> {
        match self.ahead {
            Some(byte) if buffer.remaining() > 0 => {
                self.ahead = None;
                buffer.put_slice(&[byte]);
                Poll::Ready(Ok(()))
            }
            _ => Pin::new(&mut self.stream).poll_read(context, buffer),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Probe<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        ready!(self.write_left(context))?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Result<()>> {
        ready!(self.write_left(context))?;
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        if !self.working.get() {
            return Poll::Ready(Ok(()));
        }
        self.look(context)?;
        self.probe(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Result<()>> {
        ready!(self.write_left(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        pieces: &[IoSlice],
    ) -> Poll<Result<usize>> {
        ready!(self.write_left(context))?;
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(test);
    }

    fn working(stream: DuplexStream) -> Probe<DuplexStream> {
        let working = Working::default();
        working.set(true);
        Probe::new(stream, working)
    }

    #[test]
    fn what_was_read_ahead_is_given_and_nothing_is_sent() {
        run(async {
            let (near, mut far) = duplex(1 << 10);
            let mut near = working(near);
            near.flush().await.unwrap();
            far.write_all(b"next").await.unwrap();
            near.flush().await.unwrap();
            near.flush().await.unwrap();
            let mut four = [0; 4];
            near.read_exact(&mut four).await.unwrap();
            assert_eq!(&four, b"next");
            near.write_all(b"answer").await.unwrap();
            drop(near);
            let mut all = Vec::new();
            far.read_to_end(&mut all).await.unwrap();
            assert_eq!(all, b"answer");
        });
    }

    #[test]
    fn interim_responses_go_out_whole_before_the_answer() {
        run(async {
            // Room for a part of one only.
            let (near, far) = duplex(10);
            let mut near = working(near);
            let (mut take, mut give) = split(far);
            give.shutdown().await.unwrap();
            let first = tokio::time::timeout(Duration::from_millis(20), near.flush()).await;
            assert!(first.is_err(), "there was room for all of it");
            let reader = async {
                let mut all = Vec::new();
                take.read_to_end(&mut all).await.unwrap();
                all
            };
            let writer = async {
                near.working.set(false);
                near.write_all(b"answer").await.unwrap();
                near.flush().await.unwrap();
                drop(near);
            };
            let (all, ()) = tokio::join!(reader, writer);
            assert_eq!(all, [INTERIM, b"answer"].concat());
        });
    }

    #[test]
    fn who_is_gone_breaks_the_stream() {
        run(async {
            let (near, far) = duplex(1 << 10);
            let mut near = working(near);
            near.flush().await.unwrap();
            drop(far);
            let error = near.flush().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        });
    }

    #[test]
    fn no_interim_response_outside_of_the_work() {
        run(async {
            let (near, far) = duplex(1 << 10);
            let mut near = Probe::new(near, Working::default());
            let (mut take, mut give) = split(far);
            give.shutdown().await.unwrap();
            near.flush().await.unwrap();
            let mut none = Vec::new();
            near.read_to_end(&mut none).await.unwrap();
            drop(near);
            take.read_to_end(&mut none).await.unwrap();
            assert_eq!(none, b"");
        });
    }
}
