//! Value parsers for settings.

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// RabbitMQ limits names to 255 bytes; ours get a suffix of up to 15, and `amq.` is its own.
///
/// # Errors
/// What is allowed, in words.
pub fn queue_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 240 || text.starts_with("amq.") {
        return Err("expected a name of 1 to 240 bytes that does not start with amq.".to_owned());
    }
    Ok(text.to_owned())
}

/// PEM text of which all can be used: whoever adds an authority must not find it ignored later on.
///
/// # Errors
/// What is allowed, in words.
pub fn certificates(text: &str) -> Result<String, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let mut roots = RootCertStore::empty();
    let usable = certificates.is_ok_and(|certificates| {
        !certificates.is_empty() && certificates.into_iter().all(|one| roots.add(one).is_ok())
    });
    usable.then(|| text.to_owned()).ok_or_else(|| "expected certificates in PEM form".to_owned())
}
