use futures_util::FutureExt as _;
use messaging::events::Kind;

use super::*;
use crate::object::Object;

/// A subscription that has sent its first block.
fn subscription(view: &Arc<ViewState>, request: Request) -> Subscription {
    let stage = Stage::AwaitingTable(request.after.clone());
    let (subscribers, shutdown) = (Subscribers::default(), CancellationToken::new());
    let mut subscription = Subscription::new(view, &subscribers, request, shutdown);
    subscription.stage = stage;
    subscription
}

/// A view with these objects online, all published.
async fn view(ids: std::ops::Range<i64>) -> Arc<ViewState> {
    let view = Arc::new(ViewState::new());
    change(&view, Kind::Online, ids, 1);
    view.end_reading(None).await;
    view
}

/// Applies and publishes one change.
fn change(view: &ViewState, kind: Kind, ids: impl IntoIterator<Item = i64>, last_seen: i64) {
    view.apply(kind, ids.into_iter().map(|id| Object { id, last_seen }));
    view.flush();
}

/// The kind, the ids and `remaining` of the next event.
async fn event(subscription: &mut Subscription) -> (String, Vec<i64>, String) {
    event_with_id(subscription).await.0
}

async fn event_with_id(subscription: &mut Subscription) -> ((String, Vec<i64>, String), String) {
    let text = subscription.next().await.unwrap();
    let text = std::str::from_utf8(&text).unwrap();
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let data: serde_json::Value = serde_json::from_str(field("data: ")).unwrap();
    let ids = data["objects"].as_array().unwrap().iter();
    let ids = ids.map(|object| object["id"].as_str().unwrap().parse().unwrap()).collect();
    let remaining = data["remaining"].as_str().unwrap_or_default().to_owned();
    ((field("event: ").to_owned(), ids, remaining), field("id: ").to_owned())
}

fn expected(
    name: &str,
    ids: impl IntoIterator<Item = i64>,
    remaining: &str,
) -> (String, Vec<i64>, String) {
    (name.to_owned(), ids.into_iter().collect(), remaining.to_owned())
}

#[tokio::test]
async fn too_slow_subscriber_is_disconnected_others_continue() {
    let view = view(0..0).await;
    let (mut slow, mut fast) =
        (subscription(&view, Request::default()), subscription(&view, Request::default()));
    event(&mut slow).await;
    event(&mut fast).await;
    // More changes than the ring holds.
    for time in 1..=20_000 {
        change(&view, Kind::Seen, [1], time);
        assert!(fast.next().await.is_some(), "{time}");
    }
    assert_eq!(slow.next().await.unwrap(), TOO_SLOW);
    assert!(slow.next().await.is_none());
}

#[tokio::test]
async fn all_subscribers_share_one_encoded_change() {
    let view = view(0..0).await;
    let mut subscriptions = [(); 3].map(|()| subscription(&view, Request::default()));
    for subscription in &mut subscriptions {
        event(subscription).await;
    }
    change(&view, Kind::Online, [1], 1);
    let mut pointers = Vec::new();
    for subscription in &mut subscriptions {
        pointers.push(subscription.next().await.unwrap().as_ptr());
    }
    assert!(pointers.iter().all(|pointer| *pointer == pointers[0]));
}

// Field case 2.2
#[tokio::test]
async fn snapshot_comes_in_parts_with_changes_in_between() {
    let view = view(0..300).await;
    let mut subscriber = subscription(&view, Request::default());
    // An event has at most 128 objects.
    assert_eq!(event(&mut subscriber).await, expected("snapshot", 0..128, "follow"));
    // Changes of 200 and 201 are not sent, because the list will contain their later state.
    change(&view, Kind::Seen, [5, 200], 2);
    change(&view, Kind::Gone, [7, 201], 2);
    assert_eq!(event(&mut subscriber).await, expected("seen", [5], ""));
    assert_eq!(event(&mut subscriber).await, expected("gone", [7], ""));
    let second: Vec<i64> = (128..201).chain(202..257).collect();
    assert_eq!(event(&mut subscriber).await, expected("more", second, "follow"));
    // This change is not published yet, so it comes after the list.
    view.apply(Kind::Online, std::iter::once(Object { id: 1_000, last_seen: 3 }));
    assert_eq!(event(&mut subscriber).await, expected("more", 257..300, "none"));
    view.flush();
    assert_eq!(event(&mut subscriber).await, expected("online", [1_000], ""));
}

#[tokio::test]
async fn stream_yields_to_other_tasks_before_each_part_of_a_list() {
    let view = view(0..300).await;
    let mut subscriber = subscription(&view, Request::default());
    for _ in 0..3 {
        assert!(subscriber.next().now_or_never().is_none());
        event(&mut subscriber).await;
    }
}

#[tokio::test]
async fn snapshot_resumes_where_it_was_interrupted() {
    let view = view(-300..0).await;
    let mut first = subscription(&view, Request::default());
    assert_eq!(event(&mut first).await, expected("snapshot", -300..-172, "follow"));
    let (more, event_id) = event_with_id(&mut first).await;
    assert_eq!(more, expected("more", -172..-44, "follow"));
    change(&view, Kind::Seen, [-200], 2);
    let after = Some(event_id);
    let mut second = subscription(&view, Request { after, ..Request::default() });
    assert_eq!(event(&mut second).await, expected("resumed", [], "follow"));
    assert_eq!(event(&mut second).await, expected("seen", [-200], ""));
    let (more, event_id) = event_with_id(&mut second).await;
    assert_eq!(more, expected("more", -44..0, "none"));
    assert_eq!(event_id, view.event_id(view.last()));
}

#[tokio::test]
async fn limit_restricts_the_stream_to_the_lowest_ids() {
    let view = view(0..300).await;
    let mut subscriber = subscription(&view, Request { limit: Some(100), ..Request::default() });
    let (snapshot, event_id) = event_with_id(&mut subscriber).await;
    assert_eq!(snapshot, expected("snapshot", 0..100, "over_limit"));
    change(&view, Kind::Seen, 90..200, 2);
    assert_eq!(event(&mut subscriber).await, expected("seen", 90..100, ""));
    // Once a quarter is gone, further objects are listed.
    change(&view, Kind::Gone, 0..30, 2);
    assert_eq!(event(&mut subscriber).await, expected("gone", 0..30, ""));
    assert_eq!(event(&mut subscriber).await, expected("more", 100..130, "over_limit"));
    // Once a quarter more than the limit are online, a new snapshot comes.
    change(&view, Kind::Online, 0..30, 3);
    assert_eq!(event(&mut subscriber).await, expected("online", 0..30, ""));
    assert_eq!(event(&mut subscriber).await, expected("snapshot", 0..100, "over_limit"));

    let request = Request { limit: Some(100), after: Some(event_id), ..Request::default() };
    let mut resumed = subscription(&view, request);
    assert_eq!(event(&mut resumed).await, expected("resumed", [], "over_limit"));
    assert_eq!(event(&mut resumed).await, expected("seen", 90..100, ""));
    assert_eq!(event(&mut resumed).await, expected("gone", 0..30, ""));
}

#[tokio::test]
async fn snapshot_below_the_limit_is_followed_by_all_changes() {
    let view = view(0..3).await;
    let mut subscriber = subscription(&view, Request { limit: Some(4), ..Request::default() });
    assert_eq!(event(&mut subscriber).await, expected("snapshot", 0..3, "none"));
    change(&view, Kind::Online, [50, 60], 2);
    assert_eq!(event(&mut subscriber).await, expected("online", [50, 60], ""));
    change(&view, Kind::Online, [70], 2);
    assert_eq!(event(&mut subscriber).await, expected("online", [70], ""));
    let four = [0, 1, 2, 50];
    assert_eq!(event(&mut subscriber).await, expected("snapshot", four, "over_limit"));
}

#[tokio::test]
async fn heartbeat_carries_the_id_of_skipped_changes() {
    let view = view(0..0).await;
    let filter = Filter::Ids(Box::from([2]));
    let mut subscriber = subscription(&view, Request { filter, ..Request::default() });
    event(&mut subscriber).await;
    assert_eq!(subscriber.heartbeat(), HEARTBEAT);
    change(&view, Kind::Online, [1], 1);
    assert_eq!(subscriber.next_event().await, Ok(None));
    let line = format!("id: {}\n\n", view.event_id(view.last()));
    assert_eq!(subscriber.heartbeat(), line.as_bytes());
    assert_eq!(subscriber.heartbeat(), HEARTBEAT);
}
