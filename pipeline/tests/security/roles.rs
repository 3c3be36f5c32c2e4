//! Services that log in as roles which may not make the table, and the process that may.

use std::path::Path;

use testbed::{PostgresCluster, Process, eventually};

use crate::PATIENCE;

#[tokio::test]
async fn services_without_create_right_wait_for_the_migration() {
    let database = PostgresCluster::start().await;
    database.require_passwords().await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/postgres-roles.sql");
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
    let without_table = async || {
        eventually("the routine waits for the table", PATIENCE, async || {
            let (status, reason) = routine.get("/readyz").await;
            (status == 503 && reason.contains("does not exist")).then_some(())
        })
        .await;
    };
    without_table().await;
    let migration = Process::spawn("lastseen", &url("migration:m"), &["migrate"]);
    routine.ready().await;

    let lost =
        sqlx::query("DROP TABLE object, _lastseen_migrations").execute(database.pool()).await;
    lost.unwrap();
    eventually("the table is ready again", PATIENCE, async || {
        let told = migration.log().iter().filter(|line| *line == "the table is ready").count();
        (told == 2).then_some(())
    })
    .await;
    routine.ready().await;
    let right = "SELECT has_table_privilege('lastseen_consumer', 'object', 'INSERT')";
    let granted: bool = sqlx::query_scalar(right).fetch_one(database.pool()).await.unwrap();
    assert!(granted, "the consumer's rights come with the table");

    migration.terminate();
    assert_eq!(migration.wait().await.code(), Some(0));
    let once = Process::spawn("lastseen", &url("migration:m"), &["migrate", "--once"]);
    assert_eq!(once.wait().await.code(), Some(0));
    let of_nothing = Process::spawn("lastseen", &[], &["migrate"]);
    assert_eq!(of_nothing.wait().await.code(), Some(78));
    of_nothing.wait_for_log("DATABASE_URL must be set").await;
}
