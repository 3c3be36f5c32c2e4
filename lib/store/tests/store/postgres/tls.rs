use std::path::Path;
use std::time::Duration;

use clap::Parser as _;
use store::{Config, Objects};
use testkit::{Authority, PostgresCluster};

use super::{config, start_with};
use crate::{ready, seen, unready};

#[derive(clap::Parser)]
struct Settings {
    #[command(flatten)]
    config: Config,
}

fn url(cluster: &PostgresCluster, host: &str, authority: Option<&Path>) -> String {
    let port = cluster.port();
    let trusted = authority.map(|file| format!("&sslrootcert={}", file.display()));
    let trusted = trusted.unwrap_or_default();
    format!("postgres://postgres:s3cret@{host}:{port}/postgres?sslmode=verify-full{trusted}")
}

/// Asserts that both the store and a reader cannot connect, and returns the reason.
async fn connection_error(config: &Config) -> String {
    let store = start_with(config, 1);
    let reason = unready(&store, "cannot connect").await;
    assert!(reason.starts_with("cannot connect"), "{reason}");
    assert!(store.record_seen(&[seen(1, Duration::ZERO)]).await.is_err());
    let Err(reader) = Objects::open(config).await else { panic!("a reader connects: {reason}") };
    assert_eq!(reader.to_string(), reason);
    assert!(!reason.contains("s3cret"), "{reason}");
    reason
}

/// The number of client connections without TLS, except for the one that runs this query.
async fn plain_text_connections(cluster: &PostgresCluster) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
               WHERE backend_type = 'client backend' AND NOT ssl AND application_name <> ''";
    sqlx::query_scalar(sql).fetch_one(cluster.pool()).await.unwrap()
}

#[tokio::test]
async fn database_needs_a_trusted_authority_and_the_right_name() {
    let authority = Authority::new();
    let cluster = PostgresCluster::start_with_tls(&authority).await;
    let file = authority.file();

    let trusted = config(&url(&cluster, "localhost", Some(&file)));
    let store = start_with(&trusted, 1);
    ready(&store).await;
    store.record_seen(&[seen(1, Duration::ZERO)]).await.unwrap();
    assert_eq!(Objects::open(&trusted).await.unwrap().count().await.unwrap(), 1);

    let port = format!("--postgres-port={}", cluster.port());
    let certificates = format!("--postgres-sslrootcert={}", file.display());
    let single = ["x", "--postgres-host=localhost", &port, "--postgres-sslmode=verify-full"];
    let with_authority = Settings::parse_from(single.into_iter().chain([certificates.as_str()]));
    ready(&start_with(&with_authority.config, 1)).await;

    for stranger in [config(&url(&cluster, "localhost", None)), Settings::parse_from(single).config]
    {
        let reason = connection_error(&stranger).await;
        assert!(reason.contains("UnknownIssuer"), "{reason}");
    }
    let reason = connection_error(&config(&url(&cluster, "127.0.0.1", Some(&file)))).await;
    assert!(reason.contains("not valid for name"), "{reason}");
    assert_eq!(plain_text_connections(&cluster).await, 0);
}

#[tokio::test]
async fn no_fallback_to_plain_text_without_tls() {
    let authority = Authority::new();
    let cluster = PostgresCluster::start().await;
    let reason =
        connection_error(&config(&url(&cluster, "localhost", Some(&authority.file())))).await;
    assert!(reason.contains("does not support TLS"), "{reason}");
    assert_eq!(plain_text_connections(&cluster).await, 0);
}

#[test]
fn mode_that_would_silently_mean_plain_text_is_rejected() {
    for mode in ["allow", "verify_full", ""] {
        let settings = Settings::try_parse_from(["x", &format!("--postgres-sslmode={mode}")]);
        let error = settings.map(drop).unwrap_err().to_string();
        assert!(error.contains("verify-full"), "{error}");
    }
}
