//! A Postgres cluster of one's own, to kill and to boot again.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Signal, geteuid, kill_process};
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{AssertSqlSafe, Connection as _};

use crate::authority::Authority;
use crate::children::children_once_stopped;
use crate::database::{postgres_environment, small_pool};
use crate::process_group::ProcessGroup;
use crate::scratch::Scratch;
use crate::{eventually, free_port, ports, programs};

const BOOT_DEADLINE: Duration = Duration::from_mins(1);
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Mounts a small disk at the directory `$0`, for itself alone, and becomes the server. Only root may
/// mount, or whoever is root in a name space of its own; and there Postgres would refuse to run as
/// root, so that it gets another one in which it is not.
const WITH_SMALL_DISK: &str =
    r#"mount -t tmpfs -o size=24m small "$0" && exec unshare --user --map-user=1000 "$@""#;

/// A Postgres cluster with its own files and port, which lets anybody in as `postgres`.
#[derive(Debug)]
pub struct PostgresCluster {
    /// `None` while it is down.
    postmaster: Option<ProcessGroup>,
    /// Who runs it, when it is not who runs the test: Postgres refuses to run as root.
    user: Option<User>,
    port: u16,
    url: String,
    pool: PgPool,
    /// Whether its tables are on a small disk.
    has_small_disk: bool,
    scratch: Scratch,
}

#[derive(Clone, Copy, Debug)]
struct User {
    uid: u32,
    gid: u32,
}

impl PostgresCluster {
    /// Sets up an empty cluster and boots it.
    pub async fn start() -> Self {
        let mut cluster = Self::create(free_port(), None).await;
        cluster.boot().await;
        cluster
    }

    /// Like [`PostgresCluster::start`], speaking TLS with the authority's certificate to whoever asks
    /// for it.
    pub async fn start_with_tls(authority: &Authority) -> Self {
        let mut cluster = Self::create(free_port(), Some(authority)).await;
        cluster.boot().await;
        cluster
    }

    /// Like [`PostgresCluster::start`], with its tables on a disk of 24 MiB, which
    /// [`PostgresCluster::fill_small_disk`] fills. It cannot be booted again: the disk goes with its processes.
    /// The rest of its files is where there is room, for a Postgres without room for its log ends.
    pub async fn start_on_a_small_disk() -> Self {
        let mut cluster = Self::create(free_port(), None).await;
        let disk = cluster.disk_path();
        fs::create_dir(&disk).expect("a scratch directory should be writable");
        cluster.give_to_user(&disk);
        cluster.has_small_disk = true;
        cluster.boot().await;
        let create = format!("CREATE TABLESPACE small LOCATION '{}'", disk.display());
        let mut admin = PgConnection::connect(&cluster.url).await.expect("it has just booted");
        for sql in [create.as_str(), "ALTER DATABASE postgres SET default_tablespace = small"] {
            let done = sqlx::query(AssertSqlSafe(sql)).execute(&mut admin).await;
            done.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
        cluster
    }

    /// Starts a standby that follows this cluster by streaming replication, on another port. From then
    /// on this cluster commits nothing that the standby has not written.
    ///
    /// # Panics
    /// When this one is down, or the standby does not follow within 60 s.
    pub async fn start_standby(&self) -> Self {
        let mut standby = Self::bare(free_port());
        let mut backup = standby.command(programs::find("pg_basebackup", &installed()));
        let from =
            format!("host=127.0.0.1 port={} user=postgres application_name=standby", self.port);
        backup
            .args([
                "--checkpoint=fast",
                "--no-sync",
                "--wal-method=stream",
                "--write-recovery-conf",
            ])
            .arg("-d")
            .arg(from)
            .arg("-D")
            .arg(standby.folder());
        programs::run(backup).await;
        standby.boot().await;
        let follow =
            ["ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"];
        for sql in follow {
            let done = sqlx::query(sql).execute(&self.pool).await;
            done.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
        eventually("the standby is synchronous", BOOT_DEADLINE, async || {
            let states = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
            let following = sqlx::query_scalar(states).fetch_one(&self.pool).await;
            let following: i64 = following.expect("the cluster should run");
            (following > 0).then_some(())
        })
        .await;
        standby
    }

    /// Makes this cluster read-only while it runs, also for the sessions that are there, and waits
    /// until it is.
    ///
    /// # Panics
    /// When it is down.
    pub async fn demote(&self) {
        let demote =
            ["ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"];
        for sql in demote {
            let done = sqlx::query(sql).execute(&self.pool).await;
            done.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
        eventually("the cluster takes no writes", BOOT_DEADLINE, async || {
            let mut probe = PgConnection::connect(&self.url).await.ok()?;
            sqlx::query("CREATE TEMP TABLE probe ()").execute(&mut probe).await.err()
        })
        .await;
    }

    /// Makes a standby a primary, which waits for no standby of its own, and waits until it takes writes.
    ///
    /// # Panics
    /// When it is down, or no standby.
    pub async fn promote(&self) {
        let promote = [
            "SELECT pg_promote(true, 60)",
            "ALTER SYSTEM RESET synchronous_standby_names",
            "SELECT pg_reload_conf()",
        ];
        for sql in promote {
            let done = sqlx::query(sql).execute(&self.pool).await;
            done.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
    }

    /// Puts another, empty cluster in the place of this one, which must be down. Gives back the one
    /// that was here, which keeps its files and gets another port. Both are down.
    ///
    /// # Panics
    /// When it runs.
    pub async fn replace(&mut self) -> Self {
        assert!(self.postmaster.is_none(), "the cluster runs");
        let empty = Self::create(self.port, None).await;
        let mut former = std::mem::replace(self, empty);
        former.move_to(free_port());
        former
    }

    /// Where its database `postgres` is, as a `postgres://` URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A few connections for the test's own use; those that a kill broke are replaced at next use.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Where it is, as our services want to be told.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        postgres_environment(&self.url)
    }

    /// Its port, for a proxy.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts it on the same files and port, and waits until it takes connections, that is until it
    /// has recovered.
    ///
    /// # Panics
    /// When it runs already, or is not there within 60 s.
    pub async fn boot(&mut self) {
        assert!(self.postmaster.is_none(), "the cluster runs already");
        let log = File::options().create(true).append(true).open(self.log_path());
        let log = log.expect("a scratch file should be writable");
        let mut command = self.server();
        command
            .arg("-D")
            .arg(self.folder())
            .args(["-p", &self.port.to_string()])
            .stdout(log.try_clone().expect("a file handle can be duplicated"))
            .stderr(log);
        let postmaster =
            self.postmaster.insert(ProcessGroup::spawn(&mut command, self.scratch.path()));
        eventually("the Postgres cluster takes connections", BOOT_DEADLINE, async || {
            if let Some(status) = postmaster.try_wait() {
                panic!("the Postgres cluster ended while booting: {status}");
            }
            let connection = PgConnection::connect(&self.url).await.ok()?;
            connection.close().await.ok()
        })
        .await;
    }

    /// Kills all of its processes at once, as a power cut would, and waits until its port is closed.
    /// Nothing happens when it is down.
    pub async fn kill(&mut self) {
        self.kill_all();
        ports::closed(self.port).await;
    }

    /// Ends it as `pg_ctl stop -m immediate` does: without a checkpoint, so that it has to recover when
    /// it boots. Waits until its port is closed.
    ///
    /// # Panics
    /// When it is down, or does not end within 30 s.
    pub async fn stop_immediately(&mut self) {
        let mut postmaster = self.postmaster.take().expect("it should run");
        postmaster.signal(Signal::QUIT);
        eventually("the Postgres cluster has stopped", STOP_DEADLINE, async || {
            postmaster.try_wait()
        })
        .await;
        ports::closed(self.port).await;
    }

    /// Fills the tables' disk, to the last byte.
    ///
    /// # Panics
    /// When it is down, or its tables are on no small disk.
    pub async fn fill_small_disk(&self) {
        let rows = "SELECT repeat('x', 8000) FROM generate_series(1, 4000)";
        let error = self.write_filling(rows).await.expect_err("24 MiB should be too few");
        assert!(error.to_string().contains("No space left on device"), "{error}");
    }

    /// Makes room on it again.
    ///
    /// # Panics
    /// When it is down, or its tables are on no small disk.
    pub async fn clear_small_disk(&self) {
        let cleared = self.write_filling("SELECT 1 WHERE false").await;
        cleared.expect("a file on a full disk can be cut short");
    }

    /// Writes a file by the server, which is the only one that sees the disk.
    async fn write_filling(&self, rows: &str) -> Result<(), sqlx::Error> {
        assert!(self.has_small_disk, "it has no small disk");
        let copy = format!("COPY ({rows}) TO '{}'", self.disk_path().join("filling").display());
        sqlx::query(AssertSqlSafe(copy)).execute(&self.pool).await.map(drop)
    }

    fn kill_all(&mut self) {
        let Some(mut postmaster) = self.postmaster.take() else { return };
        // Each of its children leads a group of its own, so that killing the postmaster's group would
        // leave them to finish their statement. While it is stopped it can neither start new ones
        // nor see that the others are gone.
        postmaster.signal(Signal::STOP);
        for child in children_once_stopped(postmaster.pid()) {
            if let Err(error) = kill_process(child, Signal::KILL) {
                eprintln!("testbed: Postgres's child {child} was gone already: {error}");
            }
        }
        postmaster.kill();
        self.remove_shared_memory();
    }

    /// The kernel keeps the 56 bytes by which a postmaster sees that another one runs on its files,
    /// and has room for some thousands of them only.
    fn remove_shared_memory(&self) {
        let pid_file = fs::read_to_string(self.folder().join("postmaster.pid"));
        let Ok(pid_file) = pid_file else { return };
        let id = pid_file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
        let Some(id) = id else { return };
        let removed = Command::new("ipcrm").args(["-m", id]).stderr(Stdio::null()).status();
        if !removed.is_ok_and(|status| status.success()) {
            eprintln!("testbed: shared memory segment {id} is left behind");
        }
    }

    /// Runs a file of SQL by psql as `postgres`, with that environment; the first error ends it.
    ///
    /// # Panics
    /// When it fails.
    pub async fn run_sql(&self, file: &Path, environment: &[(&str, &str)]) {
        let mut command = Command::new(programs::find("psql", &installed()));
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", &self.url, "-f"]).arg(file);
        command.envs(environment.iter().copied());
        programs::run(command).await;
    }

    /// Has everybody give a password from now on who is not `postgres`.
    ///
    /// # Panics
    /// When the server does not take the change.
    pub async fn require_passwords(&self) {
        let rules =
            "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        fs::write(self.folder().join("pg_hba.conf"), rules)
            .expect("a scratch file should be writable");
        let reload = sqlx::query("SELECT pg_reload_conf()").execute(&self.pool).await;
        reload.expect("the server should read its files again");
    }

    /// Sets up an empty cluster.
    async fn create(port: u16, authority: Option<&Authority>) -> Self {
        let cluster = Self::bare(port);
        cluster.initialize(authority).await;
        cluster
    }

    /// A place for the files of a cluster.
    fn bare(port: u16) -> Self {
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

    fn move_to(&mut self, port: u16) {
        self.port = port;
        self.url = url_at(port);
        self.pool = small_pool(&self.url);
    }

    fn give_to_user(&self, folder: &Path) {
        if let Some(User { uid, gid }) = self.user {
            chown(folder, Some(uid), Some(gid)).expect("root can give away a directory");
        }
    }

    async fn initialize(&self, authority: Option<&Authority>) {
        let mut command = self.command(programs::find("initdb", &installed()));
        command
            .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"])
            .arg("-D")
            .arg(self.folder());
        programs::run(command).await;
        // Shared memory in files goes away with them, even after a kill.
        let mut settings = "listen_addresses = '127.0.0.1'\n\
             unix_socket_directories = ''\n\
             dynamic_shared_memory_type = mmap\n\
             track_commit_timestamp = on\n"
            .to_owned();
        if let Some(authority) = authority {
            let owner = self.user.map(|user| (user.uid, user.gid));
            let files = authority.write_to(self.scratch.path(), owner);
            let (certificate, key) = (files.certificate.display(), files.key.display());
            let tls =
                format!("ssl = on\nssl_cert_file = '{certificate}'\nssl_key_file = '{key}'\n");
            settings.push_str(&tls);
        }
        fs::write(self.folder().join("postgresql.auto.conf"), settings)
            .expect("a scratch file should be writable");
    }

    /// The server itself, however it is started.
    fn server(&self) -> Command {
        let server = programs::find("postgres", &installed());
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
        if let Some(User { uid, gid }) = self.user {
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

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join("server.log")
    }
}

impl Drop for PostgresCluster {
    fn drop(&mut self) {
        self.kill_all();
        programs::print_tail_if_panicking(&self.log_path());
    }
}

fn url_at(port: u16) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/postgres")
}

/// Such as `15.3`.
pub(crate) fn version() -> String {
    let mut command = Command::new(programs::find("postgres", &installed()));
    let printed = programs::output(command.arg("--version"));
    // postgres (PostgreSQL) 15.3 (Debian 15.3-0+deb12u1)
    printed.split_whitespace().nth(2).unwrap_or_default().to_owned()
}

/// Where Debian puts each version's programs, the newest first.
fn installed() -> Vec<PathBuf> {
    let versions = fs::read_dir(programs::servers_root().join("usr/lib/postgresql"))
        .into_iter()
        .flatten()
        .flatten();
    let mut folders: Vec<PathBuf> = versions.map(|version| version.path().join("bin")).collect();
    folders.sort();
    folders.reverse();
    folders
}

fn postgres_user() -> User {
    let users = fs::read_to_string("/etc/passwd").expect("/etc/passwd should be readable");
    users
        .lines()
        .find_map(|line| {
            let mut fields = line.strip_prefix("postgres:")?.split(':').skip(1);
            let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            Some(User { uid, gid })
        })
        .expect("when a test runs as root, Postgres runs as the user postgres: create it")
}
