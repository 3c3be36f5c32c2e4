//! A Postgres cluster of one's own, to kill and to boot again.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, geteuid, kill_process};
use sqlx::Connection as _;
use sqlx::postgres::{PgConnection, PgPool};

use crate::authority::Authority;
use crate::database::{postgres_environment, small_pool};
use crate::process_group::ProcessGroup;
use crate::scratch::Scratch;
use crate::{eventually, free_port, ports, programs};

const BOOT_DEADLINE: Duration = Duration::from_mins(1);

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
        Self::set_up(None).await
    }

    /// Like [`PostgresCluster::start`], speaking TLS with the authority's certificate to whoever asks
    /// for it.
    pub async fn start_with_tls(authority: &Authority) -> Self {
        Self::set_up(Some(authority)).await
    }

    async fn set_up(authority: Option<&Authority>) -> Self {
        let scratch = Scratch::new("postgres");
        let user = geteuid().is_root().then(postgres_user);
        if let Some(User { uid, gid }) = user {
            chown(scratch.path(), Some(uid), Some(gid)).expect("root can give away a directory");
        }
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o700))
            .expect("the owner can change a directory's mode");
        let port = free_port();
        let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        let pool = small_pool(&url);
        let mut cluster = Self { postmaster: None, user, port, url, pool, scratch };
        cluster.create(authority).await;
        cluster.boot().await;
        cluster
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
        let mut command = self.command("postgres");
        command
            .arg("-D")
            .arg(self.folder())
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
    pub async fn ask_for_passwords(&self) {
        let rules =
            "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        fs::write(self.folder().join("pg_hba.conf"), rules)
            .expect("a scratch file should be writable");
        let reload = sqlx::query("SELECT pg_reload_conf()").execute(&self.pool).await;
        reload.expect("the server should read its files again");
    }

    async fn create(&self, authority: Option<&Authority>) {
        let mut command = self.command("initdb");
        command
            .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"])
            .arg("-D")
            .arg(self.folder());
        programs::run(command).await;
        // Shared memory in files goes away with them, even after a kill.
        let mut settings = format!(
            "listen_addresses = '127.0.0.1'\n\
             port = {}\n\
             unix_socket_directories = ''\n\
             dynamic_shared_memory_type = mmap\n\
             track_commit_timestamp = on\n",
            self.port
        );
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

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(programs::find(program, &installed()));
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

/// Such as `15.3`.
pub(crate) fn version() -> String {
    let mut command = Command::new(programs::find("postgres", &installed()));
    let printed = programs::output(command.arg("--version"));
    // postgres (PostgreSQL) 15.3 (Debian 15.3-0+deb12u1)
    printed.split_whitespace().nth(2).unwrap_or_default().to_owned()
}

/// Where Debian puts each version's programs, the newest first.
fn installed() -> Vec<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
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

/// The processes that `parent` has started, once it is stopped and can start no more.
fn children_once_stopped(parent: Pid) -> Vec<Pid> {
    let parent = parent.as_raw_nonzero().get();
    // It takes effect at once on a process that sleeps, and soon on one that runs. A zombie is as
    // good as stopped.
    while stat(Path::new(&format!("/proc/{parent}")))
        .is_some_and(|stat| !matches!(stat.state, 'T' | 'Z'))
    {
        std::thread::yield_now();
    }
    fs::read_dir("/proc")
        .expect("/proc should be there")
        .flatten()
        .filter(|entry| stat(&entry.path()).is_some_and(|stat| stat.parent == parent))
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

struct Stat {
    state: char,
    parent: i32,
}

fn stat(folder: &Path) -> Option<Stat> {
    let line = fs::read_to_string(folder.join("stat")).ok()?;
    // The second field is the program's name in parentheses, which can hold anything.
    let mut fields = line.rsplit_once(") ")?.1.split(' ');
    Some(Stat { state: fields.next()?.chars().next()?, parent: fields.next()?.parse().ok()? })
}
