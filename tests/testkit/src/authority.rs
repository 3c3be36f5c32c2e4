//! A private certificate authority.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::install_tls;
use crate::scratch::Scratch;

/// A certificate authority that no system trusts, and one server certificate. The certificate is
/// valid for the name `localhost`, and not for the address 127.0.0.1.
#[derive(Debug)]
pub struct Authority {
    pem: String,
    certificate: String,
    key: String,
    scratch: Scratch,
}

impl Authority {
    /// Creates the authority, the certificate and their keys.
    pub fn new() -> Self {
        let mut authority = CertificateParams::new([]).expect("an empty list of names is valid");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "Lastseen's test authority");
        let authority_key = KeyPair::generate().expect("a key can be generated");
        let root = authority.self_signed(&authority_key).expect("a key signs its own certificate");
        let issuer = Issuer::new(authority, authority_key);

        let server = CertificateParams::new(["localhost".to_owned()]);
        let server = server.expect("localhost should be a name");
        let key = KeyPair::generate().expect("a key can be generated");
        let certificate = server.signed_by(&key, &issuer).expect("an authority signs");
        let scratch = Scratch::new("authority");
        let authority = Self {
            pem: root.pem(),
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            scratch,
        };
        fs::write(authority.file(), &authority.pem).expect("a scratch file should be writable");
        authority
    }

    /// The certificate of the authority, as PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The file with the certificate of the authority.
    pub fn file(&self) -> PathBuf {
        self.scratch.path().join("authority.pem")
    }

    /// A TLS server that has the certificate and supports these protocols (ALPN).
    pub fn acceptor(&self, protocols: &[&[u8]]) -> TlsAcceptor {
        let mut config = self.server_config();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        TlsAcceptor::from(Arc::new(config))
    }

    /// The settings of a TLS server that has the certificate.
    fn server_config(&self) -> ServerConfig {
        install_tls();
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes());
        let certificate = certificate.expect("the certificate should be PEM");
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes());
        let key = key.expect("the key should be PEM");
        let config = ServerConfig::builder().with_no_client_auth();
        config.with_single_cert(vec![certificate], key).expect("the key should fit")
    }

    /// Writes the server's certificate and key to `folder`, readable only by `owner`, and returns
    /// the paths of both.
    pub(crate) fn write_to(&self, folder: &Path, owner: Option<(u32, u32)>) -> [PathBuf; 2] {
        [("server.pem", &self.certificate), ("server.key", &self.key)].map(|(name, content)| {
            let file = folder.join(name);
            fs::write(&file, content).expect("a scratch file should be writable");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))
                .expect("the owner can change a file's mode");
            if let Some((user, group)) = owner {
                chown(&file, Some(user), Some(group)).expect("root can give away a file");
            }
            file
        })
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}
