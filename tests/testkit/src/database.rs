//! A private database on the shared server.

use std::time::Duration;

use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection as _};
use url::Url;
use uuid::Uuid;

use crate::async_drop;

/// The URL by which an administrator connects to the shared server, from `TEST_DATABASE_URL`:
/// `postgres://postgres@127.0.0.1:5432/postgres`.
pub fn database_url() -> String {
    std::env::var("TEST_DATABASE_URL")
        .expect("TEST_DATABASE_URL should be set: run the tests by `make test`, which starts the shared servers and sets it")
}

/// The table as the Go services' migration creates it.
pub const GO_TABLE: &str = "
    CREATE TABLE object (id INTEGER NOT NULL, last_seen TIMESTAMP NOT NULL, PRIMARY KEY (id));
    CREATE INDEX idx_last_seen ON object (last_seen)";

/// A new, empty database. On drop, it and all connections to it are removed.
#[derive(Debug)]
pub struct Database {
    name: String,
    admin_url: String,
    url: String,
    pool: PgPool,
}

impl Database {
    /// Creates the database on the shared server.
    pub async fn new() -> Self {
        Self::on(&database_url()).await
    }

    /// Creates the database on the server at `admin_url`.
    pub async fn on(admin_url: &str) -> Self {
        let name = format!("lastseen_test_{}", Uuid::now_v7().simple());
        let mut url = Url::parse(admin_url).expect("an administrator's URL should be a URL");
        url.set_path(&name);
        // Copying template1, the default, fails while a client is connected to template1.
        execute(admin_url, format!("CREATE DATABASE {name} TEMPLATE template0")).await.expect(
            "an administrator's URL should lead to a server where databases can be created",
        );
        let url = url.to_string();
        let pool = small_pool(&url);
        Self { name, admin_url: admin_url.to_owned(), url, pool }
    }

    /// The `postgres://` URL of the database.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A few connections for the test.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// The `POSTGRES_*` variables for the services.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        postgres_environment(&self.url)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let drop_database = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        let admin_url = self.admin_url.clone();
        async_drop::block_on("drop a test's database", async move || {
            execute(&admin_url, drop_database).await.map_err(|error| error.to_string())
        });
    }
}

/// Converts a postgres URL to the variables `POSTGRES_HOST`, `_PORT`, `_USER`, `_PASSWORD` and
/// `_DB`. A missing password becomes `unused`, because the services need one.
pub fn postgres_environment(url: &str) -> Vec<(&'static str, String)> {
    let url = Url::parse(url).expect("a postgres URL should be a URL");
    let host = url.host_str().expect("a postgres URL should have a host");
    vec![
        ("POSTGRES_HOST", host.to_owned()),
        ("POSTGRES_PORT", url.port().unwrap_or(5432).to_string()),
        ("POSTGRES_USER", url.username().to_owned()),
        ("POSTGRES_PASSWORD", url.password().unwrap_or("unused").to_owned()),
        ("POSTGRES_DB", url.path().trim_start_matches('/').to_owned()),
    ]
}

/// A small pool that connects when it is first used.
#[expect(clippy::disallowed_methods, reason = "a test that hangs fails")]
pub(crate) fn small_pool(url: &str) -> PgPool {
    PgPoolOptions::new()
        .max_connections(3)
        .acquire_timeout(Duration::from_secs(10))
        .connect_lazy(url)
        .expect("a postgres URL should be valid")
}

async fn execute(url: &str, sql: String) -> Result<(), sqlx::Error> {
    let mut connection = PgConnection::connect(url).await?;
    // The names in the statement contain only letters, digits and underscores.
    sqlx::query(AssertSqlSafe(sql)).execute(&mut connection).await?;
    connection.close().await
}
