//! A Postgres cluster that belongs to one test, which can kill it and boot it again.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Signal, geteuid, kill_process};
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{AssertSqlSafe, Connection as _};

use crate::authority::Authority;
use crate::children::{children_once_stopped, wait_until_ended};
use crate::database::{postgres_environment, small_pool};
use crate::process_group::ProcessGroup;
use crate::scratch::Scratch;
use crate::{eventually, free_port, ports, programs};

const BOOT_DEADLINE: Duration = Duration::from_mins(1);
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Mounts a small disk at the directory `$0`, which only this script and the server see, and then
/// runs the server. Mounting needs root, at least in a user namespace. Postgres refuses to run as
/// root, so the server runs in a second namespace as another user.
const WITH_SMALL_DISK: &str =
    r#"mount -t tmpfs -o size=24m small "$0" && exec unshare --user --map-user=1000 "$@""#;

/// A Postgres cluster with its own files and port, which needs no password.
#[derive(Debug)]
pub struct PostgresCluster {
    /// `None` while it is down.
    postmaster: Option<ProcessGroup>,
    /// The user and the group of the server if the test runs as root, because Postgres refuses to
    /// run as root.
    user: Option<(u32, u32)>,
    port: u16,
    url: String,
    pool: PgPool,
    /// Whether the tables are on a small disk.
    has_small_disk: bool,
    scratch: Scratch,
}

impl PostgresCluster {
    /// Sets up an empty cluster and boots it.
    pub async fn start() -> Self {
        let mut cluster = Self::create(free_port(), None).await;
        cluster.boot().await;
        cluster
    }

    /// Like [`PostgresCluster::start`], but the cluster also accepts TLS, with a certificate of
    /// `authority`.
    pub async fn start_with_tls(authority: &Authority) -> Self {
        let mut cluster = Self::create(free_port(), Some(authority)).await;
        cluster.boot().await;
        cluster
    }

    /// Like [`PostgresCluster::start`], with the tables on a disk of 24 MiB, which
    /// [`PostgresCluster::fill_small_disk`] fills. The cluster cannot be booted again, because the
    /// disk disappears with its processes. All other files are on another disk, because Postgres
    /// ends when it has no space for its write-ahead log.
    pub async fn start_on_a_small_disk() -> Self {
        let mut cluster = Self::create(free_port(), None).await;
        let disk = cluster.disk_path();
        fs::create_dir(&disk).expect("a scratch directory should be writable");
        cluster.give_to_user(&disk);
        cluster.has_small_disk = true;
        cluster.boot().await;
        let create = format!("CREATE TABLESPACE small LOCATION '{}'", disk.display());
        let mut admin =
            PgConnection::connect(&cluster.url).await.expect("the cluster has just booted");
        for sql in [create.as_str(), "ALTER DATABASE postgres SET default_tablespace = small"] {
            let done = sqlx::query(AssertSqlSafe(sql)).execute(&mut admin).await;
            done.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
        cluster
    }

    /// Starts a synchronous standby of this cluster on another port. From then on, this cluster
    /// commits only what the standby has written.
    pub async fn start_standby(&self) -> Self {
        let mut standby = Self::without_files(free_port());
        let mut backup = standby.command(programs::find("pg_basebackup", &program_folders()));
        let source =
            format!("host=127.0.0.1 port={} user=postgres application_name=standby", self.port);
        backup
            .args([
                "--checkpoint=fast",
                "--no-sync",
                "--wal-method=stream",
                "--write-recovery-conf",
            ])
            .arg("-d")
            .arg(source)
            .arg("-D")
            .arg(standby.folder());
        programs::run(backup).await;
        standby.boot().await;
        self.configure("ALTER SYSTEM SET synchronous_standby_names = '*'").await;
        eventually("the standby is synchronous", BOOT_DEADLINE, async || {
            let states = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
            let synchronous = sqlx::query_scalar(states).fetch_one(&self.pool).await;
            let synchronous: i64 = synchronous.expect("the cluster should run");
            (synchronous > 0).then_some(())
        })
        .await;
        standby
    }

    /// Makes this running cluster read-only, also for existing sessions, and waits until it rejects
    /// writes.
    pub async fn demote(&self) {
        self.configure("ALTER SYSTEM SET default_transaction_read_only = on").await;
        eventually("the cluster rejects writes", BOOT_DEADLINE, async || {
            let mut probe = PgConnection::connect(&self.url).await.ok()?;
            let is_read_only = "SELECT current_setting('transaction_read_only')::bool";
            let is_read_only = sqlx::query_scalar(is_read_only).fetch_one(&mut probe).await;
            is_read_only.is_ok_and(|is_read_only: bool| is_read_only).then_some(())
        })
        .await;
    }

    /// Promotes this standby to a primary without a standby, and waits until it accepts writes.
    pub async fn promote(&self) {
        let promoted = sqlx::query("SELECT pg_promote(true, 60)").execute(&self.pool).await;
        promoted.expect("a standby should be promotable");
        self.configure("ALTER SYSTEM RESET synchronous_standby_names").await;
    }

    /// Runs an `ALTER SYSTEM`, and makes the server apply it.
    pub async fn configure(&self, alter_system: &'static str) {
        for sql in [alter_system, "SELECT pg_reload_conf()"] {
            let done = sqlx::query(sql).execute(&self.pool).await;
            done.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
    }

    /// Replaces this cluster, which must be down, with an empty one. Returns the former cluster,
    /// which keeps its files and gets another port. Both are down.
    pub async fn replace(&mut self) -> Self {
        assert!(self.postmaster.is_none(), "the cluster runs");
        let empty = Self::create(self.port, None).await;
        let mut former = std::mem::replace(self, empty);
        former.port = free_port();
        former.url = url_at(former.port);
        former.pool = small_pool(&former.url);
        former
    }

    /// The `postgres://` URL of its database `postgres`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A few connections for the test. Those that a kill broke are replaced at their next use.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// The `POSTGRES_*` variables for the services.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        postgres_environment(&self.url)
    }

    /// The port, for a proxy.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts the cluster on the same files and port, and waits until it has recovered and accepts
    /// connections.
    pub async fn boot(&mut self) {
        assert!(self.postmaster.is_none(), "the cluster runs already");
        let mut command = self.server_command();
        command.arg("-D").arg(self.folder()).args(["-p", &self.port.to_string()]);
        self.scratch.log_to(&mut command);
        let postmaster =
            self.postmaster.insert(ProcessGroup::spawn(&mut command, self.scratch.path()));
        eventually("the Postgres cluster accepts connections", BOOT_DEADLINE, async || {
            if let Some(status) = postmaster.try_wait() {
                panic!("the Postgres cluster ended while booting: {status}");
            }
            let connection = PgConnection::connect(&self.url).await.ok()?;
            connection.close().await.ok()
        })
        .await;
    }

    /// Kills all processes of the cluster at once, like a power failure, and waits until its port
    /// is closed. Does nothing if the cluster is down.
    pub async fn kill(&mut self) {
        self.kill_all();
        ports::wait_until_closed(self.port).await;
    }

    /// Stops the cluster like `pg_ctl stop -m immediate`: without a checkpoint, so that it must
    /// recover when it boots. Waits until its port is closed.
    pub async fn stop_immediately(&mut self) {
        let mut postmaster = self.postmaster.take().expect("the cluster should run");
        postmaster.signal(Signal::QUIT);
        eventually("the Postgres cluster has stopped", STOP_DEADLINE, async || {
            postmaster.try_wait()
        })
        .await;
        ports::wait_until_closed(self.port).await;
    }

    /// Fills the disk of the tables completely.
    pub async fn fill_small_disk(&self) {
        let rows = "SELECT repeat('x', 8000) FROM generate_series(1, 4000)";
        let error = self.write_filler(rows).await.expect_err("24 MiB should be too small");
        assert!(error.to_string().contains("No space left on device"), "{error}");
    }

    /// Frees the space on the disk of the tables again.
    pub async fn clear_small_disk(&self) {
        let cleared = self.write_filler("SELECT 1 WHERE false").await;
        cleared.expect("a file on a full disk can be truncated");
    }

    /// Makes the server write a file, because only the server sees the disk.
    async fn write_filler(&self, rows: &str) -> Result<(), sqlx::Error> {
        assert!(self.has_small_disk, "the cluster has no small disk");
        let copy = format!("COPY ({rows}) TO '{}'", self.disk_path().join("filler").display());
        sqlx::query(AssertSqlSafe(copy)).execute(&self.pool).await.map(drop)
    }

    fn kill_all(&mut self) {
        let Some(mut postmaster) = self.postmaster.take() else { return };
        // Each child leads its own process group, so killing the postmaster's group would let the
        // children finish their statements. Before the children are killed, the postmaster is
        // stopped, so that it neither starts new children nor notices that others have ended.
        postmaster.signal(Signal::STOP);
        let children = children_once_stopped(postmaster.pid());
        for child in &children {
            if let Err(error) = kill_process(*child, Signal::KILL) {
                eprintln!("testkit: cannot kill Postgres's child {child}: {error}");
            }
        }
        postmaster.kill();
        // The next postmaster refuses to start while a child still uses the shared memory.
        wait_until_ended(&children);
        self.remove_shared_memory();
    }

    /// Removes the shared memory segment by which a postmaster detects another one on its files.
    /// The kernel keeps the segment after a kill, and allows only a few thousand segments.
    fn remove_shared_memory(&self) {
        let pid_file = fs::read_to_string(self.folder().join("postmaster.pid"));
        let Ok(pid_file) = pid_file else { return };
        let id = pid_file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
        let Some(id) = id else { return };
        match Command::new("ipcrm").args(["-m", id]).output() {
            Ok(output) if output.status.success() => {}
            failed => eprintln!("testkit: shared memory segment {id} is left behind: {failed:?}"),
        }
    }

    /// Runs an SQL file by psql as `postgres`, up to the first error.
    pub async fn run_sql(&self, file: &Path, environment: &[(&str, &str)]) {
        let mut command = Command::new(programs::find("psql", &program_folders()));
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", &self.url, "-f"]).arg(file);
        command.envs(environment.iter().copied());
        programs::run(command).await;
    }

    /// Makes the cluster require a password from all users except `postgres`.
    pub async fn require_passwords(&self) {
        let rules =
            "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        fs::write(self.folder().join("pg_hba.conf"), rules)
            .expect("a scratch file should be writable");
        let reload = sqlx::query("SELECT pg_reload_conf()").execute(&self.pool).await;
        reload.expect("the server should reload its files");
    }

    /// Sets up an empty cluster.
    async fn create(port: u16, authority: Option<&Authority>) -> Self {
        let cluster = Self::without_files(port);
        let mut command = cluster.command(programs::find("initdb", &program_folders()));
        command
            .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"])
            .arg("-D")
            .arg(cluster.folder());
        programs::run(command).await;
        // `mmap` puts shared memory into files, which are removed with the cluster's other files.
        // The default of 100 connections is too low for a cluster that many tests share.
        let mut settings = "listen_addresses = '127.0.0.1'\n\
             unix_socket_directories = ''\n\
             dynamic_shared_memory_type = mmap\n\
             max_connections = 300\n\
             track_commit_timestamp = on\n"
            .to_owned();
        if let Some(authority) = authority {
            let files = authority.write_to(cluster.scratch.path(), cluster.user);
            let [certificate, key] = files.each_ref().map(|file| file.display());
            let tls =
                format!("ssl = on\nssl_cert_file = '{certificate}'\nssl_key_file = '{key}'\n");
            settings.push_str(&tls);
        }
        fs::write(cluster.folder().join("postgresql.auto.conf"), settings)
            .expect("a scratch file should be writable");
        cluster
    }

    fn without_files(port: u16) -> Self {
        let scratch = Scratch::new("postgres");
        let user = geteuid().is_root().then(postgres_user);
        let url = url_at(port);
        let pool = small_pool(&url);
        let cluster =
            Self { postmaster: None, user, port, url, pool, has_small_disk: false, scratch };
        cluster.give_to_user(cluster.scratch.path());
        fs::set_permissions(cluster.scratch.path(), fs::Permissions::from_mode(0o700))
            .expect("the owner can change a directory's mode");
        cluster
    }

    fn give_to_user(&self, folder: &Path) {
        if let Some((uid, gid)) = self.user {
            chown(folder, Some(uid), Some(gid)).expect("root can give away a directory");
        }
    }

    fn server_command(&self) -> Command {
        let server = programs::find("postgres", &program_folders());
        if !self.has_small_disk {
            return self.command(server);
        }
        let mut command = self.command("unshare");
        command
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", WITH_SMALL_DISK])
            .arg(self.disk_path())
            .arg(server);
        command
    }

    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LC_ALL", "C")
            .current_dir(self.scratch.path());
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    fn disk_path(&self) -> PathBuf {
        self.scratch.path().join("disk")
    }

    fn folder(&self) -> PathBuf {
        self.scratch.path().join("cluster")
    }
}

impl Drop for PostgresCluster {
    fn drop(&mut self) {
        self.kill_all();
    }
}

fn url_at(port: u16) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/postgres")
}

/// The version of the server, such as `15.3`.
pub(crate) fn version() -> String {
    let mut command = Command::new(programs::find("postgres", &program_folders()));
    let printed = programs::output(command.arg("--version"));
    // Such as: postgres (PostgreSQL) 15.3 (Debian 15.3-0+deb12u1)
    printed.split_whitespace().nth(2).unwrap_or_default().to_owned()
}

/// The folders into which Debian installs the programs of each version, the newest first.
fn program_folders() -> Vec<PathBuf> {
    let versions = fs::read_dir(programs::servers_root().join("usr/lib/postgresql"))
        .into_iter()
        .flatten()
        .flatten();
    let mut folders: Vec<PathBuf> = versions.map(|version| version.path().join("bin")).collect();
    folders.sort();
    folders.reverse();
    folders
}

/// The ids of the user `postgres` and of its group.
fn postgres_user() -> (u32, u32) {
    let users = fs::read_to_string("/etc/passwd").expect("/etc/passwd should be readable");
    users
        .lines()
        .find_map(|line| {
            let mut fields = line.strip_prefix("postgres:")?.split(':').skip(1);
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        })
        .expect("when a test runs as root, Postgres runs as the user postgres: create it")
}
