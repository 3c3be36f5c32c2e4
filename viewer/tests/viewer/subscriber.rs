//! A client of the event stream.

use reqwest::Response;
use serde_json::Value;
use tokio::time::timeout;

use crate::PATIENCE;
use crate::fixture::client;

pub(crate) struct Subscriber {
    response: Response,
    text: String,
    /// Changes of groups that were received, but not returned yet.
    groups: Vec<Value>,
    /// The latest event id that the subscriber has received.
    pub(crate) last_id: String,
}

/// The kind of an event, and the ids in it.
pub(crate) type Event = (String, Vec<i64>);

impl Subscriber {
    pub(crate) async fn connect(url: &str, query: &str, after: Option<&str>) -> Self {
        let mut request = client().get(format!("{url}/events{query}"));
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, text: String::new(), groups: Vec::new(), last_id: String::new() }
    }

    pub(crate) async fn next(&mut self) -> Event {
        timeout(PATIENCE, self.next_or_end())
            .await
            .expect("no event in time")
            .expect("the stream ended")
    }

    /// The next `count` events, sorted.
    pub(crate) async fn next_sorted(&mut self, count: usize) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..count {
            events.push(self.next().await);
        }
        events.sort();
        events
    }

    /// The next event about objects, or the end of the stream.
    pub(crate) async fn next_or_end(&mut self) -> Option<Event> {
        loop {
            let (name, data) = self.next_of_any_kind().await?;
            if name != "resumed" && name != "group" {
                let objects = data["objects"].as_array().unwrap().iter();
                let id = |object: &Value| {
                    assert!(object["last_seen"].as_str().unwrap().ends_with('Z'));
                    object["id"].as_str().unwrap().parse().unwrap()
                };
                return Some((name, objects.map(id).collect()));
            }
        }
    }

    /// The next change of a group: `PATH WAS IS`.
    pub(crate) async fn next_group(&mut self) -> (String, Value) {
        let next = async {
            loop {
                if self.groups.is_empty() {
                    let (name, mut data) = self.next_of_any_kind().await.expect("the stream ended");
                    if name == "group" {
                        self.groups = data["groups"].as_array_mut().unwrap().drain(..).collect();
                    }
                } else {
                    return self.groups.remove(0);
                }
            }
        };
        let group = timeout(PATIENCE, next).await.expect("no event in time");
        let text = ["path", "was", "is"].map(|name| group[name].as_str().unwrap()).join(" ");
        (text, group)
    }

    /// The next event with its data, or the end of the stream.
    pub(crate) async fn next_of_any_kind(&mut self) -> Option<(String, Value)> {
        loop {
            while let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                let field = |name: &str| {
                    let mut lines = block.lines();
                    lines.find_map(|line| line.strip_prefix(name)).map(str::to_owned)
                };
                if let Some(id) = field("id: ") {
                    self.last_id = id;
                }
                if let (Some(name), Some(data)) = (field("event: "), field("data: ")) {
                    return Some((name, serde_json::from_str(&data).unwrap()));
                }
            }
            let chunk = self.response.chunk().await.ok()??;
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// Asserts that the next event has this kind and these ids.
    pub(crate) async fn expect_event(&mut self, kind: &str, ids: impl IntoIterator<Item = i64>) {
        assert_eq!(self.next().await, (kind.to_owned(), ids.into_iter().collect()));
    }
}
