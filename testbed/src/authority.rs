//! A certificate authority of one's own.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::scratch::Scratch;

/// A private authority, which no system trusts, and one certificate of it: for the name `localhost`,
/// and not for the address 127.0.0.1.
#[derive(Debug)]
pub struct Authority {
    pem: String,
    certificate: String,
    key: String,
    scratch: Scratch,
}

/// The files that a server wants to be told.
#[derive(Debug)]
pub(crate) struct ServerFiles {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Authority {
    /// Makes the authority, the certificate, and their keys.
    #[must_use]
    pub fn new() -> Self {
        let mut authority = CertificateParams::new([]).expect("no name is a bad one");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "Lastseen's test authority");
        let authority_key = KeyPair::generate().expect("a key can be made");
        let own = authority.self_signed(&authority_key).expect("a key signs its own certificate");
        let issuer = Issuer::new(authority, authority_key);

        let server = CertificateParams::new(["localhost".to_owned()]);
        let server = server.expect("localhost should be a name");
        let key = KeyPair::generate().expect("a key can be made");
        let certificate = server.signed_by(&key, &issuer).expect("an authority signs");
        let scratch = Scratch::new("authority");
        let made = Self {
            pem: own.pem(),
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            scratch,
        };
        fs::write(made.file(), &made.pem).expect("a scratch file should be writable");
        made
    }

    /// Its own certificate, as PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The file with its own certificate.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.scratch.path().join("authority.pem")
    }

    /// Lays the server's certificate and its key down in `folder`, the key for that user alone.
    pub(crate) fn write_to(&self, folder: &Path, owner: Option<(u32, u32)>) -> ServerFiles {
        let files =
            ServerFiles { certificate: folder.join("server.pem"), key: folder.join("server.key") };
        for (file, content) in [(&files.certificate, &self.certificate), (&files.key, &self.key)] {
            fs::write(file, content).expect("a scratch file should be writable");
            fs::set_permissions(file, fs::Permissions::from_mode(0o600))
                .expect("the owner can change a file's mode");
            if let Some((user, group)) = owner {
                chown(file, Some(user), Some(group)).expect("root can give away a file");
            }
        }
        files
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}
