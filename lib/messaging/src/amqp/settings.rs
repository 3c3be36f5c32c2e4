//! Value parsers for settings.

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// Checks a queue name. RabbitMQ limits names to 255 bytes, Lastseen appends up to 15, and RabbitMQ
/// reserves the prefix `amq.`.
///
/// # Errors
/// A text that says what is allowed.
pub fn queue_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 240 || text.starts_with("amq.") {
        return Err("expected a name of 1 to 240 bytes that does not start with amq.".to_owned());
    }
    Ok(text.to_owned())
}

/// Checks PEM certificates. Each must be usable, because an ignored authority would only be noticed
/// when a connection fails.
///
/// # Errors
/// A text that says what is allowed.
pub fn certificates(text: &str) -> Result<String, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let mut roots = RootCertStore::empty();
    let usable = certificates.is_ok_and(|certificates| {
        !certificates.is_empty()
            && certificates.into_iter().all(|certificate| roots.add(certificate).is_ok())
    });
    usable.then(|| text.to_owned()).ok_or_else(|| "expected certificates in PEM form".to_owned())
}
