//! The listening socket: connections, their limits, TLS, and a stop that lets running answers finish.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::http::{App, router};
use crate::probe::{Connection, Probe, Progress, Stage};
use crate::stall::Stall;

/// Where to listen and how long to wait for clients.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The address; port 0 takes a free one.
    pub address: SocketAddr,
    /// Connections at the same time; more wait to be accepted.
    pub connections: usize,
    /// For the head of a request to come, and for an idle connection.
    pub head: Duration,
    /// For a client to take a piece of an answer.
    pub write: Duration,
    /// For running answers to finish once the server is to stop.
    pub drain: Duration,
    /// Certificate chain and private key, both PEM.
    pub tls: Option<(PathBuf, PathBuf)>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            connections: 1024,
            head: Duration::from_secs(30),
            write: Duration::from_secs(60),
            drain: Duration::from_secs(30),
            tls: None,
        }
    }
}

/// A server that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address.
    #[error("listen on {address}: {source}")]
    Listen {
        /// What was asked for.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The certificate or the key.
    #[error("read {}: {message}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// No threads.
    #[error("start the server's threads: {0}")]
    Threads(std::io::Error),
}

/// A server that listens.
pub struct Server {
    runtime: tokio::runtime::Runtime,
    listener: TcpListener,
    address: SocketAddr,
    config: ServerConfig,
    app: Arc<App>,
    tls: Option<TlsAcceptor>,
    stop: watch::Sender<bool>,
}

/// Stops a server from anywhere.
#[derive(Clone)]
pub struct Stopper(watch::Sender<bool>);

impl Stopper {
    /// Nothing new is taken; what runs is finished within the time for it.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Server {
    /// Binds the address; connections wait until [`Server::run`].
    pub fn bind(app: App, config: ServerConfig) -> Result<Self, ServerError> {
        let tls = config
            .tls
            .as_ref()
            .map(|(chain, key)| acceptor(chain, key))
            .transpose()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("http")
            .enable_all()
            .build()
            .map_err(ServerError::Threads)?;
        let listen = |source| ServerError::Listen {
            address: config.address,
            source,
        };
        let listener = runtime
            .block_on(TcpListener::bind(config.address))
            .map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        Ok(Server {
            runtime,
            listener,
            address,
            app: Arc::new(app),
            tls,
            stop: watch::Sender::new(false),
            config,
        })
    }

    /// The address that clients use.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://…` or `https://…`.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// What stops it.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Serves until it is stopped; returns when every answer has ended and every state is on disk.
    pub fn run(self) {
        let Server {
            runtime,
            listener,
            config,
            app,
            tls,
            stop,
            ..
        } = self;
        runtime.block_on(serve(listener, config, app.clone(), tls, stop.subscribe()));
        app.join();
        runtime.shutdown_timeout(Duration::from_secs(1));
    }
}

async fn serve(
    listener: TcpListener,
    config: ServerConfig,
    app: Arc<App>,
    tls: Option<TlsAcceptor>,
    mut stop: watch::Receiver<bool>,
) {
    let router = router(app.clone());
    let places = Arc::new(Semaphore::new(config.connections));
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let Some((stream, permit)) = accepted else {
            continue;
        };
        let (router, tls, stop, config) =
            (router.clone(), tls.clone(), stop.clone(), config.clone());
        tokio::spawn(async move {
            let _permit = permit;
            // A connection that breaks is its client's loss.
            let _ = stream.set_nodelay(true);
            let _ = SockRef::from(&stream).set_tcp_keepalive(&alive());
            match tls {
                None => connection(stream, router, &config, stop).await,
                Some(tls) => {
                    if let Ok(Ok(stream)) = timeout(config.head, tls.accept(stream)).await {
                        connection(stream, router, &config, stop).await;
                    }
                }
            }
        });
    }
    drop(listener);
    app.close(false);
    let all = u32::try_from(config.connections).unwrap_or(u32::MAX);
    if timeout(config.drain, places.acquire_many(all))
        .await
        .is_err()
    {
        app.close(true);
        // The ends are written out.
        let _ = timeout(Duration::from_secs(2), places.acquire_many(all)).await;
    }
}

/// What the system asks a client of itself that says nothing: one that went without a word is found within two minutes, one that
/// closed only its sending side and goes later within about as long.
fn alive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let permit = places.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => Some((stream, permit)),
        Err(_) => {
            // Out of file descriptors: others must close first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}

async fn connection<S>(
    stream: S,
    router: Router,
    config: &ServerConfig,
    mut stop: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Connection + Unpin + Send + 'static,
{
    let progress = Progress::default();
    let io = TokioIo::new(Probe::new(
        Stall::new(stream, config.write),
        progress.clone(),
    ));
    let service = service(router, progress);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(config.head)
        // Who has closed the sending side after a whole request is answered; `Probe` finds those who are gone.
        .half_close(true)
        .max_buf_size(64 << 10)
        .serve_connection(io, service);
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stop.wait_for(|stop| *stop) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

fn service(
    router: Router,
    progress: Progress,
) -> impl hyper::service::Service<
    hyper::Request<Incoming>,
    Response = hyper::Response<Body>,
    Error = Infallible,
    Future: Send,
> {
    let router = TowerToHyperService::new(router);
    service_fn(move |mut request: hyper::Request<Incoming>| {
        progress.set(match request.body().is_end_stream() {
            true => Stage::None,
            false => Stage::Unread,
        });
        // Who reads the body says when it is read.
        request.extensions_mut().insert(progress.clone());
        let (answer, progress) = (router.call(request), progress.clone());
        async move {
            let answer = answer.await;
            if !progress.is(Stage::Unread) {
                progress.set(Stage::None);
            }
            answer
        }
    })
}

fn acceptor(chain: &Path, key: &Path) -> Result<TlsAcceptor, ServerError> {
    let wrong = |path: &Path, message: String| ServerError::Tls {
        path: path.to_path_buf(),
        message,
    };
    let certificates = CertificateDer::pem_file_iter(chain)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(chain, error.to_string()))?;
    let private =
        PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_no_client_auth()
                .with_single_cert(certificates, private)
        })
        .map_err(|error| wrong(chain, error.to_string()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
