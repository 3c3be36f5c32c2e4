use testkit::{Partner, StatusApi, wait_for, wait_until};

use crate::{Home, MILLISECOND};

#[tokio::test]
async fn second_process_on_the_directory_exits_69() {
    let home = Home::new(&[]);
    let (first, _) = home.start(&["--no-partner"]).await;
    let (code, lines) = home.run(&["--no-partner"]).await;
    assert_eq!(code, Some(69), "{lines:?}");
    let output = lines.concat();
    assert!(output.contains("queue.db is in use by another process"), "{output}");
    assert!(output.contains(&format!("(process {})", first.pid())), "{output}");
    assert!(first.is_running());
    // The directory is free after the end of the first process, even if it was killed.
    first.kill();
    home.start(&["--no-partner"]).await;
}

#[tokio::test]
async fn unrecognised_file_prevents_the_start_and_is_unchanged() {
    for file in ["queue.db", "store.db"] {
        for content in [&b"these are my notes\n"[..], &[0; 4096], b"SQLite format 3\0 and no more"]
        {
            let home = Home::new(&[]);
            std::fs::create_dir(home.file("")).unwrap();
            std::fs::write(home.file(file), content).unwrap();
            home.assert_fails(&[], 70, file).await;
            assert_eq!(std::fs::read(home.file(file)).unwrap(), content);
        }
    }
}

/// Field case 3.5.
#[tokio::test]
async fn damaged_queue_is_kept_and_its_readable_part_used() {
    let status_api = StatusApi::even_ids_online(MILLISECOND);
    let endpoint = status_api.endpoint();
    let home = Home::new(&[("TESTER_ENDPOINT", &endpoint), ("OBJECT_TTL", "1h")]);
    let (lastseen, endpoint) = home.start(&["--no-tester", "--no-consumer"]).await;
    let ids: Vec<i64> = (0..2_000).collect();
    assert!(Partner::default().post(&endpoint, &ids).await);
    lastseen.stop().await;
    let mut damaged = std::fs::read(home.file("queue.db")).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle..middle + 8_192].fill(0xA5);
    std::fs::write(home.file("queue.db"), &damaged).unwrap();

    let (lastseen, _) = home.start(&["--no-tester"]).await;
    lastseen.wait_for_log("a damaged queue is kept").await;
    let kept_as = lastseen.wait_for_log("of the damaged file have been copied").await;
    let kept_as = kept_as.split("kept_as=").nth(1).unwrap().split(' ').next().unwrap();
    assert!(std::fs::read(kept_as.trim()).unwrap() == damaged, "the kept file was changed");
    let (_, ready) = lastseen.get("/readyz").await;
    assert!(ready.contains("without intact queue: ") && ready.contains(kept_as), "{ready}");
    wait_until("the readable messages are looked up", async || {
        // The three damaged pages hold some 200 messages, half of whose objects are online.
        home.online().await.len() > 700
    })
    .await;
}

#[tokio::test]
async fn objects_and_acks_survive_a_restart() {
    let (status_api, home) = Home::with_even_ids_online(MILLISECOND);
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    assert!(Partner::default().post(&endpoint, &[2, 8]).await);
    let both_online = async || (home.online().await == [2, 8]).then_some(());
    wait_for("both are online", both_online).await;
    let snapshot = home.file("viewer.snapshot");
    wait_until("the viewer has saved its snapshot", async || snapshot.exists()).await;
    lastseen.stop().await;
    // The command also works while no process runs.
    assert_eq!(home.online().await, [2, 8]);
    let (lastseen, _) = home.start(&["--no-tester"]).await;
    lastseen.wait_for_log("restored the objects from the snapshot").await;
    assert_eq!(home.online().await, [2, 8]);
    assert_eq!(status_api.lookups().len(), 2, "an acked id was looked up again");
}

/// When a command closes a file, it must not mistake itself for the last user of that file. SQLite
/// would then delete the write-ahead log, to which the pipeline continues to write.
#[tokio::test]
async fn command_beside_the_pipeline_keeps_its_wal_files() {
    let (_status_api, home) = Home::with_even_ids_online(MILLISECOND);
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    let partner = Partner::default();
    assert!(partner.post(&endpoint, &[2]).await);
    for command in [&["objects"][..], &["dead-letters", "list"]] {
        assert_eq!(home.run(command).await.0, Some(0));
    }
    assert!(home.file("queue.db-wal").exists() && home.file("store.db-wal").exists());
    assert!(partner.post(&endpoint, &[4]).await);
    wait_until("both are online", async || home.online().await == [2, 4]).await;
    lastseen.kill();
    assert_eq!(home.online().await, [2, 4], "a committed row was lost with the kill");
}
