use std::time::{Duration, Instant};

use testkit::{Answer, Reply, StatusApi, http_get, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const DEADLINE: Duration = Duration::from_secs(10);

async fn look_up(api: &StatusApi, id: i64) -> Reply {
    http_get(api.address(), &format!("/objects/{id}")).await.unwrap()
}

#[tokio::test]
async fn status_api_gives_every_kind_of_answer() {
    let api = StatusApi::start(|id, _| match id {
        1 => Answer::Online,
        2 => Answer::Offline,
        3 => Answer::Status(503),
        4 => Answer::StatusWithHeader(429, "retry-after", "7".to_owned()),
        5 => Answer::Body("not json".to_owned()),
        6 => Answer::Redirect("http://elsewhere/objects/6".to_owned()),
        7 => Answer::Online.after(Duration::from_millis(80)),
        8 => Answer::Huge(1_000),
        _ => Answer::Hang,
    });
    assert!(api.endpoint().starts_with("http://127.0.0.1:"));
    let online = look_up(&api, 1).await;
    assert_eq!((online.status, online.body.as_str()), (200, r#"{"id":1,"online":true}"#));
    assert!(online.head.contains("content-type: application/json"), "{}", online.head);
    assert_eq!(look_up(&api, 2).await.body, r#"{"id":2,"online":false}"#);
    assert_eq!(look_up(&api, 3).await.status, 503);
    let limited = look_up(&api, 4).await;
    assert_eq!(limited.status, 429);
    assert!(limited.head.contains("retry-after: 7"), "{}", limited.head);
    assert_eq!(look_up(&api, 5).await.body, "not json");
    let redirect = look_up(&api, 6).await;
    assert_eq!(redirect.status, 302);
    assert!(redirect.head.contains("location: http://elsewhere/objects/6"), "{}", redirect.head);
    let started = Instant::now();
    assert_eq!(look_up(&api, 7).await.status, 200);
    assert!(started.elapsed() >= Duration::from_millis(80));
    let huge = look_up(&api, 8).await;
    assert_eq!(huge.body.len(), 1_000 * 1_024 + r#"{"id":8,"online":true}"#.len());
    assert_eq!(huge.body.trim_start(), r#"{"id":8,"online":true}"#);

    assert_eq!(api.in_flight(), 0);
    let (hung, ()) = tokio::join!(
        tokio::time::timeout(Duration::from_millis(300), look_up(&api, 9)),
        wait_until("it is in flight", async || api.in_flight() == 1),
    );
    assert!(hung.is_err());
    wait_until("the disconnect of the client is detected", async || api.in_flight() == 0).await;
    assert_eq!(api.max_in_flight(), 1);
    let ids: Vec<i64> = api.lookups().into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
}

#[tokio::test]
async fn status_api_trickles_one_byte_per_second() {
    let api = StatusApi::start(|_, _| Answer::Trickle);
    let mut stream = TcpStream::connect(api.address()).await.unwrap();
    let started = Instant::now();
    stream.write_all(b"GET /objects/1 HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(br#"{"id"#) {
        let byte = tokio::time::timeout(DEADLINE, stream.read_u8()).await;
        answer.push(byte.unwrap().unwrap());
    }
    assert!(started.elapsed() >= Duration::from_secs(4), "four bytes in {:?}", started.elapsed());
}

#[tokio::test]
async fn only_sent_decisions_count_as_answered() {
    let api = StatusApi::start(|id, lookup| match (id, lookup) {
        (1, lookup) => Answer::Online.after(Duration::from_millis(200 * u64::from(lookup - 1))),
        _ => Answer::Status(500),
    });
    let decisions = || api.decisions().get(&1).map(|all| (all.received, all.answered));
    assert_eq!(look_up(&api, 1).await.body, r#"{"id":1,"online":true}"#);
    assert_eq!(decisions(), Some((1, 1)));

    let impatient = tokio::time::timeout(Duration::from_millis(100), look_up(&api, 1)).await;
    assert!(impatient.is_err());
    wait_until("the disconnect of the client is detected", async || api.in_flight() == 0).await;
    assert_eq!((api.lookups_of(1), decisions()), (2, Some((2, 1))));
    assert_eq!(look_up(&api, 2).await.status, 500);
    assert!(!api.decisions().contains_key(&2));
}

#[tokio::test]
async fn status_api_answers_by_the_count_of_lookups_of_an_id() {
    let api = StatusApi::start(|_, lookup| match lookup {
        1 => Answer::Status(500),
        _ => Answer::Online,
    });
    assert_eq!(look_up(&api, -5).await.status, 500);
    assert_eq!(look_up(&api, -5).await.status, 200);
    assert_eq!(look_up(&api, 9).await.status, 500);
    assert_eq!((api.lookups_of(-5), api.lookups_of(9), api.lookups_of(1)), (2, 1, 0));
}

#[tokio::test]
async fn stopped_status_api_cuts_off_lookups_and_can_restart() {
    let mut api = StatusApi::start(|_, _| Answer::Hang);
    let address = api.address();
    let hanging = tokio::spawn(http_get(address, "/objects/1"));
    wait_until("it is in flight", async || api.in_flight() == 1).await;
    api.stop();
    assert!(tokio::time::timeout(DEADLINE, hanging).await.unwrap().unwrap().is_err());
    assert!(http_get(address, "/objects/1").await.is_err());
    assert_eq!((api.in_flight(), api.lookups_of(1)), (0, 1));

    api.set_behaviour(|_, _| Answer::Online);
    api.restart();
    assert_eq!((look_up(&api, 1).await.status, api.lookups_of(1)), (200, 2));
}
