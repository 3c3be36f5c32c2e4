use std::time::Duration;

use testkit::wait_for;

use crate::HOUR;
use crate::fixture::{Fixture, client, ids};

#[tokio::test]
async fn pages_list_all_objects_in_ascending_order() {
    let all = [i64::MIN, -5, 0, 3, 4, 8, i64::MAX];
    let (_fixture, viewer) = Fixture::showing(all).await;
    let (mut found, mut after) = (Vec::new(), String::new());
    for size in [3, 3, 1] {
        let (status, page) = viewer.get(&format!("/objects?limit=3{after}")).await;
        assert_eq!((status, ids(&page).len()), (200, size));
        found.extend(ids(&page));
        after = page["next"].as_str().map_or(String::new(), |next| format!("&after={next}"));
    }
    assert_eq!((found.as_slice(), after.as_str()), (&all[..], ""), "the last page has no next");
    let (_, page) = viewer.get("/objects?ids=8,3,77,-5&limit=2").await;
    assert_eq!(ids(&page), [-5, 3]);
    let next = page["next"].as_str().unwrap();
    let (_, page) = viewer.get(&format!("/objects?ids=8,3,77,-5&limit=2&after={next}")).await;
    assert_eq!((ids(&page), page["next"].is_null()), (vec![8], true));
}

#[tokio::test]
async fn seen_within_lists_only_recently_seen_objects() {
    let fixture = Fixture::new().await;
    fixture.record_aged([1], HOUR / 2).await;
    fixture.record_aged([2], Duration::from_mins(1)).await;
    let viewer = fixture.start_viewer().await;
    viewer.expect_objects([1, 2]).await;
    for (within, expected) in [("10s", &[][..]), ("10m", &[2]), ("2h", &[1, 2])] {
        let (_, page) = viewer.get(&format!("/objects?seen_within={within}")).await;
        assert_eq!(ids(&page), expected, "{within}");
    }
}

#[tokio::test]
async fn object_has_its_sightings_latest_first() {
    let (fixture, viewer) = Fixture::showing([]).await;
    let mut sightings = Vec::new();
    for count in 1..=3 {
        fixture.record([7]).await;
        // Wait for each sighting, because a reading of the table finds only the latest one.
        sightings = wait_for("the viewer has received the sighting", async || {
            let (status, object) = viewer.get("/objects/7").await;
            let sightings = object["sightings"].as_array().cloned().unwrap_or_default();
            (status == 200 && sightings.len() == count && object["last_seen"] == sightings[0])
                .then_some(sightings)
        })
        .await;
    }
    let texts: Vec<&str> = sightings.iter().map(|at| at.as_str().unwrap()).collect();
    assert!(texts[0] > texts[1] && texts[1] > texts[2], "{texts:?}");
    let sql = "SELECT to_char(last_seen AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') FROM object";
    let row: String = sqlx::query_scalar(sql).fetch_one(fixture.database.pool()).await.unwrap();
    assert_eq!(row, texts[0], "not equal to the microsecond");
    let (status, problem) = viewer.get("/objects/8").await;
    assert_eq!(
        (status, problem["detail"].as_str()),
        (404, Some("object 8 is neither online nor in the history"))
    );
}

#[tokio::test]
async fn invalid_request_gets_a_problem_with_the_reason() {
    let (_fixture, viewer) = Fixture::showing([]).await;
    for (path, status, detail) in [
        ("/objects?limit=0", 400, "limit: expected a number from 1 to 1000"),
        ("/objects?limit=1&limit=2", 400, "duplicate field"),
        ("/objects?after=7", 400, "after: expected"),
        ("/objects?ids=1,x", 400, "ids: expected"),
        ("/objects?seen_within=soon", 400, "seen_within: expected"),
        ("/objects?seen_whithin=1s", 400, "unknown field"),
        ("/objects/x", 400, "id: expected"),
        ("/objects/%ff", 400, ""),
        ("/objects/9223372036854775808", 400, "id: expected"),
        ("/events?ids=", 400, "ids: expected"),
        ("/nowhere", 404, "no such path: /nowhere"),
    ] {
        let (got, problem) = viewer.get(path).await;
        assert_eq!(got, status, "{path}");
        let text = problem["detail"].as_str().unwrap();
        assert!(text.contains(detail), "{path}: {text}");
    }
    let answer = client().post(format!("{}/objects", viewer.url)).send().await.unwrap();
    assert_eq!(answer.status(), 405);
    assert_eq!(answer.headers()["allow"], "GET,HEAD");
    assert_eq!(answer.headers()["content-type"], "application/problem+json");
}

#[tokio::test]
async fn pages_and_files_are_served_with_a_strict_content_policy() {
    let (_fixture, viewer) = Fixture::showing([]).await;
    for (path, content_type) in [
        ("/", "text/html; charset=utf-8"),
        ("/page/main.js", "text/javascript; charset=utf-8"),
        ("/page/page.css", "text/css; charset=utf-8"),
        ("/openapi.json", "application/json"),
    ] {
        let answer = client().get(format!("{}{path}", viewer.url)).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        assert_eq!(answer.headers()["content-type"], content_type);
        let policy = answer.headers()["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'self';"), "{policy}");
    }
}

// Field case 7.1
#[tokio::test]
async fn page_does_not_link_to_the_root_of_the_host() {
    let (_fixture, viewer) = Fixture::showing([]).await;
    let page = client().get(format!("{}/", viewer.url)).send().await.unwrap();
    let page = page.text().await.unwrap();
    assert!(page.contains("href=\"page/"), "{page}");
    for link in ["href=\"/", "src=\"/"] {
        assert!(!page.contains(link), "{page}");
    }
    let (_, description) = viewer.get("/openapi.json").await;
    assert_eq!(description["servers"][0]["url"], "./");
}

// Field case 7.4
#[tokio::test]
async fn ids_beyond_53_bits_are_strings_that_match_the_pattern() {
    let id = i64::MAX - 1;
    let (_fixture, viewer) = Fixture::showing([id]).await;
    let (_, object) = viewer.get(&format!("/objects/{id}")).await;
    assert_eq!(object["id"], "9223372036854775806");
    let (status, page) = viewer.get(&format!("/objects?ids={id},{}", i64::MIN)).await;
    assert_eq!((status, &page["objects"][0]["id"]), (200, &object["id"]));
    let (_, description) = viewer.get("/openapi.json").await;
    let schema = &description["components"]["schemas"]["ObjectId"];
    assert_eq!(schema["type"], "string", "{schema}");
    assert_eq!(schema["pattern"], "^(0|-?[1-9][0-9]{0,18})$");
}

// Field case 7.6
#[tokio::test]
async fn request_for_another_host_name_is_rejected() {
    let (_fixture, viewer) = Fixture::showing([]).await;
    let status = async |host: &str, path: &str| {
        let request = client().get(format!("{}{path}", viewer.url)).header("host", host);
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    for path in ["/", "/stats", "/events", "/nowhere"] {
        let (code, problem) = status("evil.example:9080", path).await;
        assert_eq!(code, 421, "{path}");
        assert!(problem.contains("evil.example") && problem.contains("VIEWER_HOSTS"), "{problem}");
    }
    for host in ["localhost:9080", "viewer", "viewer.prod.svc.cluster.local"] {
        assert_eq!(status(host, "/stats").await.0, 200, "{host}");
    }
}

#[tokio::test]
async fn stats_report_objects_subscribers_and_services() {
    let (_fixture, viewer) = Fixture::showing([1, 2]).await;
    let _subscriber = viewer.subscribe("", None).await;
    let stats = wait_for("the services are scraped, and events arrive", async || {
        let (_, stats) = viewer.get("/stats").await;
        let is_complete = stats["services"].as_array()?.len() == 3 && stats["subscribers"] == 1;
        (is_complete && stats["events"] == "ok").then_some(stats)
    })
    .await;
    assert_eq!((&stats["online"], &stats["table"]), (&2.into(), &"ok".into()));
    assert!(stats["lookups_in_flight"].is_null(), "{stats}");
    assert!(stats["at"].as_str().unwrap().ends_with('Z'));
}

// Field case 1.8
#[tokio::test]
async fn page_port_serves_health_checks() {
    let (_fixture, viewer) = Fixture::showing([]).await;
    for path in ["/livez", "/readyz"] {
        assert_eq!(viewer.get(path).await.0, 200, "{path}");
    }
    viewer.stop().await;
}
