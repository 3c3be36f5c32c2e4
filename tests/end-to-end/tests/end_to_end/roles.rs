//! Services whose database roles may not create the table, and the migration that may.

use std::path::Path;

use testkit::{PostgresCluster, Process, wait_until};

#[tokio::test]
async fn services_without_create_right_wait_for_the_migration() {
    let database = PostgresCluster::start().await;
    database.require_passwords().await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/postgres-roles.sql");
    let passwords = [
        ("POSTGRES_MIGRATION_PASSWORD", "m"),
        ("POSTGRES_CONSUMER_PASSWORD", "c"),
        ("POSTGRES_ROUTINE_PASSWORD", "r"),
        ("POSTGRES_VIEWER_PASSWORD", "v"),
    ];
    database.run_sql(Path::new(script), &passwords).await;
    let url = |login| {
        let url = format!("postgres://lastseen_{login}@127.0.0.1:{}/postgres", database.port());
        [("DATABASE_URL", url)]
    };

    let routine = Process::spawn("routine", &url("routine:r"), &[]);
    routine.wait_until_unready(&["does not exist"]).await;
    let migration = Process::spawn("lastseen", &url("migration:m"), &["migrate"]);
    routine.ready().await;

    let dropped =
        sqlx::query("DROP TABLE object, _lastseen_migrations").execute(database.pool()).await;
    dropped.unwrap();
    wait_until("the table is created again", async || {
        let count = migration.log().iter().filter(|line| *line == "the table is ready").count();
        count == 2
    })
    .await;
    routine.ready().await;
    let privilege = "SELECT has_table_privilege('lastseen_consumer', 'object', 'INSERT')";
    let is_granted: bool = sqlx::query_scalar(privilege).fetch_one(database.pool()).await.unwrap();
    assert!(is_granted, "the new table should have the consumer's privileges");

    migration.stop().await;
    let once = Process::spawn("lastseen", &url("migration:m"), &["migrate", "--once"]);
    assert_eq!(once.wait().await.code(), Some(0));
    let without_url = Process::spawn("lastseen", &[], &["migrate"]);
    assert_eq!(without_url.wait().await.code(), Some(78));
    without_url.wait_for_log("DATABASE_URL must be set").await;
}
