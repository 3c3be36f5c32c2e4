//! Tests of the roles that scripts/postgres-roles.sql creates.

use std::path::Path;
use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use store::{Config, History, Objects, Presence, Store};
use testkit::{PostgresCluster, wait_for};

use super::{ids, insert, start};
use crate::{HOUR, delete_stale, ready, seen, unready};

const ROLES: [&str; 4] = ["migration", "consumer", "routine", "viewer"];

/// Revokes the privileges of all other roles.
const REVOKE: (&str, &str) = ("POSTGRES_REVOKE_PUBLIC", "yes");

async fn cluster_with_roles() -> PostgresCluster {
    let cluster = PostgresCluster::start().await;
    cluster.require_passwords().await;
    make_roles(&cluster, &[REVOKE]).await;
    cluster
}

/// Runs the script with the usual passwords, except for those in `more`.
async fn make_roles(cluster: &PostgresCluster, more: &[(&str, &str)]) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/postgres-roles.sql");
    let passwords = [
        ("POSTGRES_MIGRATION_PASSWORD", "of-migration"),
        ("POSTGRES_CONSUMER_PASSWORD", "of-consumer"),
        ("POSTGRES_ROUTINE_PASSWORD", "of-routine"),
        ("POSTGRES_VIEWER_PASSWORD", "of-viewer"),
    ];
    let environment: Vec<(&str, &str)> = passwords.iter().chain(more).copied().collect();
    cluster.run_sql(Path::new(script), &environment).await;
}

fn url(cluster: &PostgresCluster, role: &str) -> String {
    format!("postgres://lastseen_{role}:of-{role}@127.0.0.1:{}/postgres", cluster.port())
}

fn store(cluster: &PostgresCluster, role: &str) -> Store {
    start(&url(cluster, role), 1)
}

async fn run(pool: &PgPool, sql: &str) {
    sqlx::query(AssertSqlSafe(sql)).execute(pool).await.unwrap();
}

#[tokio::test]
async fn roles_work_in_any_start_order_and_after_the_table_is_lost() {
    let cluster = cluster_with_roles().await;
    // Roles that may not create the table wait for it.
    let (consumer, routine) = (store(&cluster, "consumer"), store(&cluster, "routine"));
    unready(&consumer, "\"object\" does not exist").await;

    let _migration = store(&cluster, "migration");
    for loss in ["", "DROP TABLE object, presence_change, _lastseen_migrations"] {
        if !loss.is_empty() {
            run(cluster.pool(), loss).await;
        }
        wait_for("the consumer records", async || {
            consumer.record_seen(&[seen(1, 2 * HOUR), seen(2, Duration::ZERO)]).await.ok()
        })
        .await;
        consumer.record_seen(&[seen(2, Duration::ZERO)]).await.unwrap();
        wait_for("the routine deletes", async || {
            delete_stale(&routine, HOUR, 10).await.ok().filter(|rows| *rows == 1)
        })
        .await;
        wait_for("the routine maintains the history", async || {
            routine.maintain_history().await.ok()
        })
        .await;
        let viewer = History::new(&Config::at(url(&cluster, "viewer").parse().unwrap()));
        wait_for("the viewer reads that", async || {
            let last = viewer.latest(1).await.ok().flatten();
            last.filter(|last| last.presence == Presence::Gone)
        })
        .await;
        assert_eq!(ids(cluster.pool()).await, [2]);
    }
    for store in [&consumer, &routine] {
        ready(store).await;
    }
}

#[tokio::test]
async fn each_role_has_only_the_rights_that_it_needs() {
    let cluster = cluster_with_roles().await;
    ready(&store(&cluster, "migration")).await;
    let (consumer, routine) = (store(&cluster, "consumer"), store(&cluster, "routine"));
    let viewer = Config::at(url(&cluster, "viewer").parse().unwrap());
    let all_rights = [
        ("consumer", &["SELECT", "INSERT", "UPDATE"][..]),
        ("routine", &["SELECT", "UPDATE", "DELETE"]),
        ("viewer", &["SELECT"]),
    ];
    for (role, rights) in all_rights {
        let granted: Vec<String> = sqlx::query_scalar(
            "SELECT privilege_type FROM pg_class, aclexplode(relacl)
             WHERE oid = 'object'::regclass AND grantee = $1::regrole ORDER BY 1",
        )
        .bind(format!("lastseen_{role}"))
        .fetch_all(cluster.pool())
        .await
        .unwrap();
        let mut expected = rights.to_vec();
        expected.sort_unstable();
        assert_eq!(granted, expected, "{role}");
        for right in rights {
            insert(cluster.pool(), 1..=1, 2 * HOUR).await;
            run(cluster.pool(), &format!("REVOKE {right} ON object FROM lastseen_{role}")).await;
            let error = match role {
                "consumer" => consumer.record_seen(&[seen(1, HOUR)]).await.err(),
                "routine" => delete_stale(&routine, HOUR, 10).await.err(),
                _ => Objects::open(&viewer).await.unwrap().page(None, 10).await.err(),
            };
            let error = error.unwrap_or_else(|| panic!("{role} works without {right}"));
            assert!(error.to_string().contains("permission denied"), "{error}");
            run(cluster.pool(), &format!("GRANT {right} ON object TO lastseen_{role}")).await;
            run(cluster.pool(), "TRUNCATE object").await;
        }
    }
}

#[tokio::test]
async fn no_role_can_exceed_its_rights() {
    let cluster = cluster_with_roles().await;
    ready(&store(&cluster, "migration")).await;
    run(cluster.pool(), "CREATE TABLE other (id int)").await;
    let forbidden = [
        ("consumer viewer", "DELETE FROM object"),
        ("viewer", "UPDATE object SET last_seen = now()"),
        ("routine viewer", "INSERT INTO object VALUES (1, now())"),
        ("consumer routine viewer", "TRUNCATE object"),
        ("consumer routine viewer", "DROP TABLE object"),
        ("consumer routine viewer", "ALTER TABLE object ADD COLUMN note text"),
        ("consumer routine viewer", "CREATE TABLE mine (id int)"),
        ("consumer routine viewer migration", "CREATE TEMPORARY TABLE mine (id int)"),
        ("consumer routine viewer migration", "SELECT * FROM other"),
        (
            "viewer",
            "INSERT INTO presence_change (object_id, last_seen, is_online) VALUES (1, now(), false)",
        ),
        ("consumer routine viewer", "UPDATE presence_change SET is_online = false"),
        ("consumer routine viewer", "DELETE FROM presence_change"),
        ("consumer routine viewer", "DELETE FROM presence_change_default"),
        ("consumer routine", "SELECT FROM presence_change"),
        ("consumer viewer", "SELECT presence_change_maintain('1 h')"),
        ("consumer routine viewer", "SELECT presence_change_restrict('object')"),
        ("consumer routine viewer migration", "CREATE SCHEMA mine"),
        ("consumer routine viewer migration", "CREATE ROLE mine"),
        ("consumer routine viewer migration", "SET ROLE postgres"),
    ];
    for role in ROLES {
        let mut connection = PgConnection::connect(&url(&cluster, role)).await.unwrap();
        for (_, sql) in forbidden.iter().filter(|(roles, _)| roles.contains(role)) {
            let refused = sqlx::query(*sql).execute(&mut connection).await;
            let refused = refused.map(drop).unwrap_err();
            let code = refused.as_database_error().unwrap().code();
            assert_eq!(code.as_deref(), Some("42501"), "{role}: {sql}: {refused}");
        }
    }
    let stranger = url(&cluster, "consumer").replace("of-consumer", "of-routine");
    assert!(PgConnection::connect(&stranger).await.is_err());
    run(cluster.pool(), "CREATE ROLE stranger LOGIN PASSWORD 'x'").await;
    let stranger = format!("postgres://stranger:x@127.0.0.1:{}/postgres", cluster.port());
    let error = PgConnection::connect(&stranger).await.unwrap_err();
    assert!(error.to_string().contains("permission denied for database"), "{error}");
}

/// Field case 4.6.
#[tokio::test]
async fn database_that_may_be_shared_stays_open_to_other_roles() {
    let cluster = PostgresCluster::start().await;
    cluster.require_passwords().await;
    make_roles(&cluster, &[]).await;
    run(cluster.pool(), "CREATE ROLE stranger LOGIN PASSWORD 'x'").await;
    let stranger = format!("postgres://stranger:x@127.0.0.1:{}/postgres", cluster.port());
    let mut stranger = PgConnection::connect(&stranger).await.unwrap();
    sqlx::raw_sql("CREATE TEMPORARY TABLE mine (id int)").execute(&mut stranger).await.unwrap();
    for role in ["migration", "consumer", "routine"] {
        ready(&store(&cluster, role)).await;
    }
}

/// Field case 6.11.
#[tokio::test]
async fn changed_password_is_applied_by_the_next_run_of_the_script() {
    let cluster = cluster_with_roles().await;
    ready(&store(&cluster, "migration")).await;
    let verifier = "SELECT rolpassword FROM pg_authid WHERE rolname = current_user";
    let admin_before: Option<String> =
        sqlx::query_scalar(verifier).fetch_one(cluster.pool()).await.unwrap();
    let changed = [
        ("POSTGRES_ADMIN_PASSWORD", "changed"),
        ("POSTGRES_MIGRATION_PASSWORD", "changed"),
        ("POSTGRES_CONSUMER_PASSWORD", "changed"),
        ("POSTGRES_ROUTINE_PASSWORD", "changed"),
        ("POSTGRES_VIEWER_PASSWORD", "changed"),
    ];
    make_roles(&cluster, &changed).await;
    for role in ROLES {
        let before = url(&cluster, role);
        assert!(PgConnection::connect(&before).await.is_err(), "{role}");
        PgConnection::connect(&before.replace(&format!("of-{role}"), "changed")).await.unwrap();
    }
    let admin_after: Option<String> =
        sqlx::query_scalar(verifier).fetch_one(cluster.pool()).await.unwrap();
    assert_ne!(admin_after, admin_before);
}

#[tokio::test]
async fn existing_table_works_after_the_roles_are_created() {
    let cluster = PostgresCluster::start().await;
    let superuser = start(cluster.url(), 1);
    ready(&superuser).await;
    superuser.record_seen(&[seen(1, 2 * HOUR)]).await.unwrap();
    drop(superuser);
    cluster.require_passwords().await;
    make_roles(&cluster, &[REVOKE]).await;
    make_roles(&cluster, &[REVOKE]).await;
    for role in ROLES {
        ready(&store(&cluster, role)).await;
    }
    store(&cluster, "consumer").record_seen(&[seen(2, Duration::ZERO)]).await.unwrap();
    assert_eq!(delete_stale(&store(&cluster, "routine"), HOUR, 10).await.unwrap(), 1);
    assert_eq!(ids(cluster.pool()).await, [2]);
}
