//! Viewers that save what they show, and restore it at their next start.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::{Database, Process, Queue, Scratch, System, free_port, viewer_address, wait_until};
use tokio::time::{sleep, timeout};

use crate::fixture::{Fixture, RunningViewer, get, ids};
use crate::{HOUR, PATIENCE};

/// Makes readings of the table fail, so that a viewer is ready only if it restores its snapshot.
const HIDE_TABLE: &str = "ALTER TABLE object RENAME COLUMN last_seen TO elsewhere";
const SHOW_TABLE: &str = "ALTER TABLE object RENAME COLUMN elsewhere TO last_seen";

/// The file of a viewer's snapshot in a directory of its own.
struct File {
    path: PathBuf,
    directory: Scratch,
}

impl File {
    fn new() -> Self {
        let directory = Scratch::new("snapshot");
        Self { path: directory.path().join("viewer.snapshot"), directory }
    }

    fn setting(&self) -> (&'static str, &str) {
        ("VIEWER_SNAPSHOT", self.path.to_str().unwrap())
    }

    async fn wait(&self) {
        wait_until("the snapshot is saved", async || self.path.exists()).await;
    }

    /// The names of all files in the directory, sorted.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Changes one byte in the middle.
    fn damage(&self) {
        let mut bytes = fs::read(&self.path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&self.path, bytes).unwrap();
    }
}

async fn start(fixture: &Fixture, file: &Path) -> RunningViewer {
    let setting = format!("--viewer-snapshot={}", file.display());
    fixture.start_viewer_with_settings(fixture.exchange.clone(), &[&setting]).await
}

/// Starts a viewer, and waits until it is ready and receives events.
async fn start_ready(fixture: &Fixture, file: &Path) -> RunningViewer {
    let viewer = start(fixture, file).await;
    let missing = || (viewer.health.missing(), viewer.health.missing_optional());
    wait_until("the viewer is ready", async || missing() == (Vec::new(), Vec::new())).await;
    viewer
}

/// Runs a viewer that sees an object online twice, until it has saved both sightings. Returns them.
async fn save_two_sightings(fixture: &Fixture, file: &File, id: i64) -> serde_json::Value {
    fixture.record([id]).await;
    let viewer = start_ready(fixture, &file.path).await;
    file.wait().await;
    fixture.record([id]).await;
    wait_until("two sightings are known", async || sightings(&viewer, id).await.1 == 2).await;
    let sightings = sightings(&viewer, id).await.0;
    viewer.stop().await;
    sightings
}

/// The sightings of an object, and their number.
async fn sightings(viewer: &RunningViewer, id: i64) -> (serde_json::Value, usize) {
    let sightings = viewer.get(&format!("/objects/{id}")).await.1["sightings"].take();
    let count = sightings.as_array().map_or(0, Vec::len);
    (sightings, count)
}

#[tokio::test]
async fn restarted_viewer_remembers_sightings_and_applies_changes() {
    let ((_cluster, fixture), file) = (Fixture::alone().await, File::new());
    fixture.record([2]).await;
    fixture.record_aged([3], 2 * HOUR).await;
    let saved = save_two_sightings(&fixture, &file, 1).await;
    assert_eq!(fs::metadata(&file.path).unwrap().permissions().mode() & 0o777, 0o600);

    fixture.record([4]).await;
    fixture.clean_up().await;
    // The history does not show this change.
    fixture.execute_without_event("DELETE FROM object WHERE id = 2").await;
    fixture.execute_without_event(HIDE_TABLE).await;
    let viewer = start(&fixture, &file.path).await;
    wait_until("the viewer is ready", async || viewer.health.missing().is_empty()).await;
    assert_eq!(viewer.ids().await, [1, 2, 4]);
    assert_eq!(sightings(&viewer, 1).await.0, saved);
    assert_eq!(viewer.health.missing_optional()[0].0, "table");

    fixture.execute_without_event(SHOW_TABLE).await;
    viewer.expect_objects([1, 4]).await;
    assert_eq!(sightings(&viewer, 1).await.0, saved);
    assert_eq!(file.names(), ["viewer.snapshot"]);
}

#[tokio::test]
async fn viewer_without_usable_snapshot_reads_the_table() {
    let (fixture, file) = (Fixture::new().await, File::new());
    for unusable in ["damaged", "no snapshot", "old"] {
        save_two_sightings(&fixture, &file, 1).await;
        match unusable {
            "damaged" => file.damage(),
            "no snapshot" => fs::write(&file.path, "someone's notes").unwrap(),
            _ => {
                fixture.record([10, 11]).await;
                let forget = "DELETE FROM presence_change
                              WHERE position < (SELECT max(position) FROM presence_change)";
                fixture.execute_without_event(forget).await;
            }
        }
        let content = fs::read(&file.path).unwrap();
        let viewer = start_ready(&fixture, &file.path).await;
        assert_eq!(sightings(&viewer, 1).await.1, 1, "{unusable}");
        viewer.stop().await;
        let kept_as = match unusable {
            "damaged" => "viewer.snapshot.damaged",
            "no snapshot" => "viewer.snapshot.foreign",
            _ => continue,
        };
        assert_eq!(fs::read(file.directory.path().join(kept_as)).unwrap(), content, "{unusable}");
        // The next viewer begins without a snapshot.
        _ = fs::remove_file(&file.path);
    }
    let names = file.names().into_iter().filter(|name| name != "viewer.snapshot");
    assert!(names.eq(["viewer.snapshot.damaged", "viewer.snapshot.foreign"]), "{:?}", file.names());
}

#[tokio::test]
async fn snapshot_of_another_database_is_set_aside() {
    let (fixture, other, file) = (Fixture::new().await, Fixture::new().await, File::new());
    fixture.record([1]).await;
    save_two_sightings(&other, &file, 1).await;
    let viewer = start_ready(&fixture, &file.path).await;
    assert_eq!(sightings(&viewer, 1).await.1, 1);
    assert!(file.names().contains(&"viewer.snapshot.foreign".to_owned()), "{:?}", file.names());
}

#[tokio::test]
async fn restored_view_has_changes_that_were_not_settled() {
    let ((_cluster, fixture), file) = (Fixture::alone().await, File::new());
    save_two_sightings(&fixture, &file, 1).await;
    // While this transaction is open, the history does not show later changes.
    let mut open = fixture.database.pool().begin().await.unwrap();
    sqlx::query("SELECT pg_current_xact_id()").execute(&mut *open).await.unwrap();
    fixture.record([2]).await;
    fixture.execute_without_event(HIDE_TABLE).await;
    let viewer = start(&fixture, &file.path).await;
    wait_until("the viewer waits", async || {
        let reads = "SELECT count(*) > 0 FROM pg_stat_activity
                     WHERE datname = current_database() AND query LIKE '%age((pg_snapshot_xmin%'
                       AND pid <> pg_backend_pid()";
        sqlx::query_scalar(reads).fetch_one(fixture.database.pool()).await.unwrap()
    })
    .await;
    open.commit().await.unwrap();
    wait_until("the viewer is ready", async || viewer.health.missing().is_empty()).await;
    assert_eq!(viewer.ids().await, [1, 2]);
}

#[tokio::test]
async fn viewer_without_history_saves_nothing() {
    let (fixture, file) = (Fixture::new().await, File::new());
    let setting = format!("--viewer-snapshot={}", file.path.display());
    let running = async |retention| {
        let settings = [setting.as_str(), retention];
        let exchange = fixture.exchange.clone();
        let viewer = fixture.start_viewer_with_settings(exchange, &settings).await;
        wait_until("the viewer is ready", async || viewer.health.missing().is_empty()).await;
        viewer.supervisor.running().contains(&"snapshot".to_owned())
    };
    assert!(running("--history-retention=1h").await);
    assert!(!running("--history-retention=0").await);
}

#[tokio::test]
async fn viewer_that_cannot_save_reports_it_once_and_serves() {
    let (fixture, file) = (Fixture::new().await, File::new());
    fixture.record([1]).await;
    let no_directory = file.directory.path().join("file");
    fs::write(&no_directory, "").unwrap();
    let path = no_directory.join("viewer.snapshot");
    let viewer = spawn(&fixture.database, ("VIEWER_SNAPSHOT", path.to_str().unwrap()));
    let line = viewer.wait_for_log("cannot save the snapshot").await;
    assert!(line.contains("WARN") && line.contains("File exists"), "{line}");
    assert_eq!(listed(&viewer).await, [1]);
    fs::remove_file(&no_directory).unwrap();
    viewer.stop().await;
    assert!(path.exists());
    let log = viewer.log().join("\n");
    assert_eq!(log.matches("cannot save").count(), 1, "{log}");
    assert!(log.contains("saved the snapshot again"), "{log}");
}

#[tokio::test]
async fn viewer_killed_while_it_saves_leaves_the_previous_snapshot() {
    let (fixture, file) = (Fixture::new().await, File::new());
    fixture.record([1]).await;
    // Enough that a save takes a while.
    let insert = "INSERT INTO object SELECT id, now() FROM generate_series(2, 50000) AS id";
    fixture.execute_without_event(insert).await;
    let viewer = spawn(&fixture.database, file.setting());
    file.wait().await;
    viewer.stop().await;
    let unfinished = file.path.with_extension("snapshot.new");
    let inode = || fs::metadata(&file.path).unwrap().ino();
    wait_until("a viewer is killed while it saves", async || {
        let (saved, before) = (fs::read(&file.path).unwrap(), inode());
        let viewer = spawn(&fixture.database, file.setting());
        viewer.wait_for_log("restored the objects from the snapshot").await;
        let save_begins = async {
            while !unfinished.exists() && inode() == before {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, save_begins).await.unwrap();
        viewer.kill();
        viewer.wait().await;
        assert!(inode() != before || fs::read(&file.path).unwrap() == saved);
        unfinished.exists()
    })
    .await;
    let viewer = spawn(&fixture.database, file.setting());
    viewer.wait_for_log("restored the objects from the snapshot").await;
    // The viewer removes the unfinished file when it saves again.
    viewer.ready().await;
    viewer.stop().await;
}

#[tokio::test]
async fn viewer_with_a_snapshot_is_not_ready_without_the_database() {
    let (fixture, file) = (Fixture::new().await, File::new());
    save_two_sightings(&fixture, &file, 1).await;
    let content = fs::read(&file.path).unwrap();
    let nowhere = format!("postgres://postgres@127.0.0.1:{}/postgres", free_port());
    let viewer = Process::spawn(
        "viewer",
        &[
            ("VIEWER_ADDR", "127.0.0.1:0".to_owned()),
            ("DATABASE_URL", nowhere),
            ("VIEWER_SNAPSHOT", file.path.to_str().unwrap().to_owned()),
        ],
        &[],
    );
    viewer.wait_until_unready(&["first reading of the table: cannot connect"]).await;
    let url = format!("http://{}", viewer_address(&viewer).await);
    assert_eq!(get(&url, "/objects").await.0, 503);
    viewer.stop().await;
    assert_eq!(fs::read(&file.path).unwrap(), content);
}

/// Starts a viewer as a process.
fn spawn(database: &Database, setting: (&'static str, &str)) -> Process {
    System::new(&Queue::new(), database, "http://127.0.0.1:1").spawn("viewer", &[setting])
}

/// The ids of the objects that the viewer lists.
async fn listed(viewer: &Process) -> Vec<i64> {
    ids(&get(&format!("http://{}", viewer_address(viewer).await), "/objects").await.1)
}
