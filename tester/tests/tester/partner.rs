//! Tests of the simulated partner.

use std::time::{Duration, Instant};

use runtime::CancellationToken;
use tester::partner::Partner;

use testkit::install_tls;

use crate::support::{Endpoint, settings, soon};

/// A partner that posts to `endpoint`, until the token is cancelled.
fn start(endpoint: &Endpoint, flags: &[&str]) -> (CancellationToken, tokio::task::JoinHandle<()>) {
    install_tls();
    let url = format!("--callback-endpoint=http://{}", endpoint.address);
    let mut all = vec![url.as_str()];
    all.extend(flags);
    let config = settings(&all);
    let (callbacks, partner) = (config.callbacks.into_inner(), config.partner.into_inner());
    let partner = Partner::new(callbacks, config.authenticity, partner).unwrap();
    let stop = CancellationToken::new();
    (stop.clone(), tokio::spawn(partner.post_until(stop)))
}

#[tokio::test]
async fn partner_posts_ids_within_the_configured_limits() {
    let mut endpoint = Endpoint::answering(200).await;
    let flags = [
        "--callback-interval=5ms",
        "--callback-ids-min=2",
        "--callback-ids-max=5",
        "--object-id-min=10",
        "--object-id-max=12",
    ];
    let (stop, posting) = start(&endpoint, &flags);
    let mut counts = Vec::new();
    let mut ids = Vec::new();
    for _ in 0..100 {
        let of_callback = endpoint.next_ids().await;
        counts.push(of_callback.len());
        ids.extend(of_callback);
    }
    stop.cancel();
    soon(posting).await.unwrap();
    // The probability that 100 draws miss one of the four counts, or 200 draws one of the three
    // ids, is below 10^-11.
    counts.sort_unstable();
    counts.dedup();
    assert_eq!(counts, [2, 3, 4, 5]);
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids, [10, 11, 12]);
}

#[tokio::test]
async fn first_callback_is_sent_at_once_next_after_the_interval() {
    let mut endpoint = Endpoint::answering(200).await;
    let started_at = Instant::now();
    let (stop, posting) = start(&endpoint, &["--callback-interval=400ms"]);
    endpoint.next_ids().await;
    assert!(started_at.elapsed() < Duration::from_millis(400));
    endpoint.next_ids().await;
    assert!(started_at.elapsed() >= Duration::from_millis(400));
    stop.cancel();
    soon(posting).await.unwrap();
}

#[tokio::test]
async fn refused_or_unanswered_callback_is_never_sent_again() {
    // Ids from a range so large that two callbacks with equal bodies can only be the same one.
    let wide = ["--object-id-max=9223372036854775807", "--callback-ids-min=1"];
    for mut endpoint in
        [Endpoint::answering(503).await, Endpoint::slow(Duration::from_secs(5), u64::MAX).await]
    {
        let mut flags = vec!["--callback-interval=5ms", "--callback-timeout=50ms"];
        flags.extend(wide);
        let (stop, posting) = start(&endpoint, &flags);
        let mut seen = Vec::new();
        for _ in 0..10 {
            seen.push(endpoint.next_ids().await);
        }
        stop.cancel();
        soon(posting).await.unwrap();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 10);
    }
}

#[tokio::test]
async fn partner_finishes_the_callback_in_flight_before_it_stops() {
    let mut endpoint = Endpoint::slow(Duration::from_millis(400), u64::MAX).await;
    let (stop, mut posting) = start(&endpoint, &[]);
    endpoint.next_ids().await;
    stop.cancel();
    // The response comes after 400 ms, and the partner waits for it.
    let brief = Duration::from_millis(100);
    assert!(tokio::time::timeout(brief, &mut posting).await.is_err());
    soon(posting).await.unwrap();
}

#[tokio::test]
async fn with_a_secret_each_callback_is_signed_under_its_own_id() {
    let first = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let flag = format!("--callback-secret={first} whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD");
    let mut endpoint = Endpoint::answering(200).await;
    let (stop, posting) = start(&endpoint, &[&flag, "--callback-interval=5ms"]);
    let keys: runtime::authenticity::Keys = first.parse().unwrap();
    let mut fingerprints = Vec::new();
    for _ in 0..10 {
        let (headers, body) = endpoint.next_request().await;
        let claim =
            runtime::authenticity::Claim::read(&headers, std::time::SystemTime::now()).unwrap();
        fingerprints.push(claim.verify(&keys, body.as_bytes()).unwrap());
    }
    stop.cancel();
    soon(posting).await.unwrap();
    fingerprints.sort_unstable();
    fingerprints.dedup();
    assert_eq!(fingerprints.len(), 10);
}

#[tokio::test]
async fn without_a_secret_a_callback_has_no_signature_headers() {
    let mut endpoint = Endpoint::answering(200).await;
    let (stop, posting) = start(&endpoint, &[]);
    let (headers, _) = endpoint.next_request().await;
    stop.cancel();
    soon(posting).await.unwrap();
    assert!(headers.keys().all(|name| !name.as_str().starts_with("webhook")), "{headers:?}");
}
