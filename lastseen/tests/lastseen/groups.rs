use std::path::PathBuf;

use serde_json::{Value, json};
use testkit::{Answer, Database, Partner, StatusApi, wait_until};

use crate::Home;

const SHOP: &str = r#"{"name": "shop", "children": [
    {"name": "berlin", "objects": ["1-3"]},
    {"name": "spare", "objects": [7], "up": "any"}]}"#;

/// Defines groups for the commands of `home`, and returns their file.
pub(crate) fn define(home: &mut Home, definition: &str) -> PathBuf {
    let file = home.scratch.path().join("groups.json");
    std::fs::write(&file, definition).unwrap();
    home.settings.push(("GROUPS_FILE", file.display().to_string()));
    file
}

/// The groups that the command prints as JSON.
async fn groups(home: &Home, arguments: &[&str]) -> Vec<Value> {
    let (code, lines) = home.run(&[&["groups", "--json"], arguments].concat()).await;
    assert_eq!(code, Some(0), "{lines:?}");
    lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Records that object 3 was online and is gone, and that 1 and 2 are online.
async fn observe(home: &mut Home) {
    home.settings.push(("OBJECT_TTL", "1s".to_owned()));
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    assert!(Partner::default().post(&endpoint, &[3]).await);
    wait_until("object 3 is gone", async || {
        home.run(&["changes"]).await.1.iter().any(|line| line.contains("gone"))
    })
    .await;
    lastseen.stop().await;
    home.settings.push(("OBJECT_TTL", "1h".to_owned()));
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    assert!(Partner::default().post(&endpoint, &[1, 2]).await);
    wait_until("1 and 2 are online", async || home.online().await == [1, 2]).await;
    lastseen.stop().await;
}

#[tokio::test]
async fn groups_are_shown_with_their_status_and_its_cause() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let database = Database::new().await;
    let endpoint = status_api.endpoint();
    let settings = [("TESTER_ENDPOINT", endpoint.as_str()), ("ROUTINE_INTERVAL", "50ms")];
    let in_postgres = [("DATABASE_URL", database.url())];
    for mut home in [Home::new(&settings), Home::new(&[&settings[..], &in_postgres].concat())] {
        observe(&mut home).await;
        define(&mut home, SHOP);
        let (code, lines) = home.run(&["groups"]).await;
        assert_eq!(code, Some(0), "{lines:?}");
        let expected = "\
PATH      STATUS       ONLINE      TOTAL  BECAUSE
shop      degraded          2          4  3 gone, berlin
  berlin  degraded          2          3  3 gone
  spare   down              0          1  7 never seen";
        assert_eq!(lines.join("\n"), expected);
        let (_, lines) = home.run(&["groups", "shop/spare"]).await;
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[1].starts_with("shop/spare  down "), "{lines:?}");

        let all = groups(&home, &[]).await;
        let paths: Vec<&str> = all.iter().filter_map(|group| group["path"].as_str()).collect();
        assert_eq!(paths, ["shop", "shop/berlin", "shop/spare"]);
        let berlin = &all[1];
        assert_eq!(
            berlin["because"],
            json!({"path": "shop/berlin", "object": "3", "kind": "gone"})
        );
        let counts = json!({
            "online": 2, "late": 0, "maintenance": 0, "never_seen": 0, "given_up": 0, "gone": 1,
        });
        assert_eq!((&berlin["counts"], &berlin["depth"]), (&counts, &json!(1)));
        assert_eq!(groups(&home, &["shop", "--depth=0"]).await.len(), 1);
        assert_eq!(groups(&home, &["--depth=1"]).await.len(), 1);
        assert_eq!(groups(&home, &["shop"]).await.len(), 3);
        let up = groups(&home, &["--groups-weights=gone=0"]).await;
        assert_eq!((&up[1]["status"], &up[1]["because"]), (&json!("up"), &Value::Null));
    }
    // A table of an earlier release has no history.
    let drop = sqlx::query("DROP TABLE presence_change");
    drop.execute(database.pool()).await.unwrap();
    let mut home = Home::new(&[&settings[..], &in_postgres].concat());
    define(&mut home, SHOP);
    let (code, lines) = home.run(&["groups", "shop/berlin"]).await;
    assert_eq!(code, Some(0), "{lines:?}");
    let lines = lines.concat();
    assert!(lines.contains("3 never seen") && lines.contains("cannot read the history"), "{lines}");
    let deep = (0..512).fold(r#"{"name": "g"}"#.to_owned(), |below, _| {
        format!(r#"{{"name": "g", "children": [{below}]}}"#)
    });
    define(&mut home, &deep);
    let path = ["g"; 513].join("/");
    home.assert_fails(&["groups", "--json", &path], 70, "longer than 1,024 bytes").await;
}

#[tokio::test]
async fn unusable_groups_are_explained() {
    let mut home = Home::new(&[]);
    home.assert_fails(&["groups"], 78, "GROUPS_FILE must be set").await;
    let file = define(&mut home, "{\"name\": \"shop\",\n \"up\": \"8x\"}");
    home.assert_fails(&["groups"], 78, "groups.json:2:8: shop: up: ").await;
    std::fs::write(&file, "[]").unwrap();
    let (code, lines) = home.run(&["groups", "shop"]).await;
    assert_eq!((code, lines.concat().as_str()), (Some(0), "GROUPS_FILE defines no group"));
    std::fs::remove_file(&file).unwrap();
    home.assert_fails(&["groups"], 78, "groups.json: cannot read it").await;
    define(&mut home, SHOP);
    let error =
        r#"there is no group "shop/berln" in GROUPS_FILE; the most similar are: shop/berlin"#;
    home.assert_fails(&["groups", "shop/berln"], 70, error).await;
    home.assert_fails(&["groups"], 70, "there is no ").await;
    assert!(!home.file("").exists());
    home.assert_fails(&["groups", "--depth=101"], 78, "a whole number from 0 to 100").await;
}
