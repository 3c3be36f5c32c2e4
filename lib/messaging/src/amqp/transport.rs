//! The byte stream below a connection to the broker: TCP, or TLS over TCP.
//!
//! lapin can make TLS connections itself, but then it also builds parsers for key stores that
//! Lastseen does not use: more than 20 crates.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::{AsyncRead, AsyncWrite, Stream};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ConfigBuilder, WantsVerifier};
use rustls_platform_verifier::Verifier;
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};
use tokio_util::either::Either;

/// An open stream, with the traits that lapin expects.
pub(super) type Transport = Compat<Either<TcpStream, TlsStream<TcpStream>>>;

/// lapin's view of tokio.
pub(super) type LapinRuntime = Runtime<RuntimeParts<Tokio, LapinReactor>>;

/// The runtime for a connection over a [`Transport`]. Must be called within tokio's runtime.
pub(super) fn lapin_runtime() -> LapinRuntime {
    Runtime::new(RuntimeParts::new(Tokio::current(), LapinReactor(Tokio::current())))
}

pub(super) fn plain(stream: TcpStream) -> Transport {
    Either::Left(stream).compat()
}

/// Performs the TLS handshake. The certificate of `host` must be signed by an authority of the
/// system, or by one of `authorities`, which are in PEM form.
///
/// # Errors
/// When the certificate is not trusted, or the handshake fails.
pub(super) async fn encrypted(
    stream: TcpStream,
    host: &str,
    authorities: Option<&str>,
) -> io::Result<Transport> {
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let connector = TlsConnector::from(Arc::new(client_config(authorities)?));
    Ok(Either::Right(connector.connect(name, stream).await?).compat())
}

fn client_config(authorities: Option<&str>) -> io::Result<ClientConfig> {
    let pem = authorities.unwrap_or_default().as_bytes();
    let authorities: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let authorities = authorities.map_err(io::Error::other)?;
    let provider = Arc::new(ring::default_provider());
    let verifier = Verifier::new_with_extra_roots(authorities, Arc::clone(&provider));
    let verifier = Arc::new(verifier.map_err(io::Error::other)?);
    let config: ConfigBuilder<ClientConfig, WantsVerifier> =
        ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?;
    Ok(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

/// Gives lapin tokio's timers. lapin never opens a stream through it, because it gets each
/// connection's [`Transport`] already open.
#[derive(Clone, Debug)]
pub(super) struct LapinReactor(Tokio);

impl Reactor for LapinReactor {
    type TcpStream = Transport;
    type Sleep = Sleep;

    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Transport, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        _: SocketAddr,
    ) -> impl Future<Output = io::Result<Transport>> + Send + 'static {
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }
}
