//! Who is still there. A client that has sent its whole request may close its side of the connection and read on; one that is gone
//! looks the same: either way the stream that it sends has ended. Only sending tells them apart, since the system of a client that is
//! gone answers with a reset, and sending after that fails. A streamed answer sends by itself. For any other, once the client's side has
//! ended, interim responses are sent (RFC 9110, section 15.2: every client of HTTP/1.1 must read them, and may ignore them). Some
//! clients refuse more than five of them, so they end; a reset that comes later, to what the system sends of itself (TCP's own
//! keep-alive), is asked for.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_rustls::server::TlsStream;

const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// When they are sent, after the end of what the client sends: the first brings the reset, the second meets it, the others find
/// clients that go later.
const TIMES: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(250),
    Duration::from_secs(5),
    Duration::from_secs(60),
];

/// How often a reset is asked for, once the client's side has ended or a further request waits: reading no longer tells of one.
const ASKED: Duration = Duration::from_secs(1);

/// For what a client still sends, once it has been answered before it had sent all.
const LINGER: Duration = Duration::from_secs(5);

/// What knows whether its connection has been reset.
pub(crate) trait Connection {
    /// The error that nobody was told yet.
    fn error(&self) -> Result<Option<Error>>;
}

impl Connection for TcpStream {
    fn error(&self) -> Result<Option<Error>> {
        self.take_error()
    }
}

impl Connection for TlsStream<TcpStream> {
    fn error(&self) -> Result<Option<Error>> {
        self.get_ref().0.error()
    }
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    /// None, or one whose answer has begun.
    None,
    /// Its body has not been read to its end.
    Unread,
    /// Read whole, and nothing of the answer has been made.
    Working,
    /// The same, of a client of HTTP/1.0, which knows no interim responses.
    Quiet,
}

/// The [`Stage`], shared by the stream and the service on it, which run in one task.
#[derive(Clone, Default)]
pub(crate) struct Progress(Arc<AtomicU8>);

impl Progress {
    pub(crate) fn set(&self, stage: Stage) {
        self.0.store(stage as u8, Ordering::Relaxed);
    }

    pub(crate) fn is(&self, stage: Stage) -> bool {
        self.0.load(Ordering::Relaxed) == stage as u8
    }
}

/// A stream that breaks while a request is worked on whose client is gone, and that closes without a reset where a client is
/// still sending: a reset could reach the client before it has read why its body was refused.
///
/// A connection that reads whole requests does not read while it waits for an answer, but it flushes each time it is asked: that is
/// where this looks. It then has nothing of its own to write.
pub(crate) struct Probe<S> {
    stream: S,
    progress: Progress,
    /// What came behind the request: nothing after it is looked at.
    ahead: Option<u8>,
    ended: Option<Instant>,
    sent: usize,
    /// When a reset was asked for last.
    asked: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    /// The rest of an interim response.
    left: &'static [u8],
    /// Until when what comes is read and thrown away.
    lingers: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + AsyncWrite + Connection + Unpin> Probe<S> {
    pub(crate) fn new(stream: S, progress: Progress) -> Self {
        Probe {
            stream,
            progress,
            ahead: None,
            ended: None,
            sent: 0,
            asked: Instant::now(),
            timer: None,
            left: &[],
            lingers: None,
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

    /// Begins the interim responses whose time has come, and asks for a reset between them and after the last.
    fn probe(&mut self, context: &mut Context) -> Poll<Result<()>> {
        while self.ended.is_some() || self.ahead.is_some() {
            let interim = match (self.ended, TIMES.get(self.sent)) {
                (Some(ended), Some(after)) if self.progress.is(Stage::Working) => {
                    Some(ended + *after)
                }
                _ => None,
            };
            let ask = self.asked + ASKED;
            let at = interim.map_or(ask, |interim| interim.min(ask));
            if Instant::now() < at {
                let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
                if timer.as_mut().poll(context).is_pending() {
                    break;
                }
            }
            self.timer = None;
            self.asked = Instant::now();
            if let Some(error) = self.stream.error()? {
                return Poll::Ready(Err(error));
            }
            if interim.is_some_and(|at| at <= self.asked) {
                self.sent += 1;
                self.left = INTERIM;
                ready!(self.write_left(context))?;
                ready!(Pin::new(&mut self.stream).poll_flush(context))?;
            }
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

impl<S: AsyncRead + AsyncWrite + Connection + Unpin> AsyncWrite for Probe<S> {
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
        if !self.progress.is(Stage::Working) && !self.progress.is(Stage::Quiet) {
            return Poll::Ready(Ok(()));
        }
        self.look(context)?;
        self.probe(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Result<()>> {
        let this = &mut *self;
        if this.lingers.is_none() {
            ready!(this.write_left(context))?;
            ready!(Pin::new(&mut this.stream).poll_shutdown(context))?;
            if !this.progress.is(Stage::Unread) {
                return Poll::Ready(Ok(()));
            }
        }
        let until = || Box::pin(sleep_until(Instant::now() + LINGER));
        let timer = this.lingers.get_or_insert_with(until);
        let mut thrown = [0; 16 << 10];
        while timer.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut thrown);
            let read = ready!(Pin::new(&mut this.stream).poll_read(context, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                break;
            }
        }
        Poll::Ready(Ok(()))
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

    impl Connection for DuplexStream {
        fn error(&self) -> Result<Option<Error>> {
            Ok(None)
        }
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(test);
    }

    fn at(stage: Stage, stream: DuplexStream) -> Probe<DuplexStream> {
        let progress = Progress::default();
        progress.set(stage);
        Probe::new(stream, progress)
    }

    fn working(stream: DuplexStream) -> Probe<DuplexStream> {
        at(Stage::Working, stream)
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
                near.progress.set(Stage::None);
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
    fn what_is_still_sent_is_taken_before_the_end() {
        run(async {
            let (near, mut far) = duplex(16);
            let mut near = at(Stage::Unread, near);
            near.write_all(b"refused").await.unwrap();
            let sender = async {
                // More than fits: it goes out only if someone reads it.
                far.write_all(&[0; 100_000]).await.unwrap();
                far.shutdown().await.unwrap();
                let mut answer = Vec::new();
                far.read_to_end(&mut answer).await.unwrap();
                answer
            };
            let (answer, shut) = tokio::join!(sender, near.shutdown());
            shut.unwrap();
            assert_eq!(answer, b"refused");
        });
    }

    #[test]
    fn no_interim_response_outside_of_the_work() {
        run(async {
            let (near, far) = duplex(1 << 10);
            let mut near = at(Stage::None, near);
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
