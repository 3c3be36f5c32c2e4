use std::collections::HashMap;
use std::time::Duration;

use store::{Change, History, Presence, Retention, Session, SessionPage, SessionQuery, Store};
use testkit::{wait_for, wait_until};

use crate::backend::{Backend, insert};
use crate::{HOUR, delete_stale, ready, seen};

on_both! {
    each_change_is_recorded_once,
    first_change_after_a_start_is_recorded,
    sessions_are_listed_newest_first_in_pages,
    sessions_of_weeks_are_listed_in_pages,
    sessions_are_filtered_by_time,
    availability_counts_the_time_online_within_the_window,
    positions_outside_the_history_are_recognised,
    missing_changes_end_or_begin_a_session,
    changes_are_read_in_pages_from_any_position,
    reader_of_concurrent_changes_skips_and_repeats_none,
    objects_that_are_gone_are_listed_until_they_come_back,
    without_retention_nothing_is_recorded,
    only_changes_older_than_the_retention_are_deleted,
}

/// Lets each of the objects come online and be deleted, `times` times.
async fn come_and_go(store: &Store, ids: std::ops::RangeInclusive<i64>, times: usize) {
    for _ in 0..times {
        insert(store, ids.clone(), 2 * HOUR).await;
        let count = ids.clone().count() as u64;
        assert_eq!(delete_stale(store, HOUR, 10_000).await.unwrap(), count);
    }
}

/// Lets object 1 come and go, such that no two changes have the same time.
async fn come_and_go_at_different_times(store: &Store, history: &History, times: usize) {
    for _ in 0..times {
        insert(store, 1..=1, 2 * HOUR).await;
        wait_until_clock_advances(history).await;
        delete_stale(store, HOUR, 10).await.unwrap();
        wait_until_clock_advances(history).await;
    }
}

/// All changes from `position` on, read in pages of `limit`.
async fn changes_from(history: &History, mut position: i64, limit: u32) -> Vec<Change> {
    let mut all = Vec::new();
    loop {
        let page = history.changes_after(position, limit).await.unwrap();
        let Some(last) = page.changes.last() else { return all };
        position = last.position;
        all.extend(page.changes);
    }
}

/// All changes, once `count` of them can be read.
async fn all_changes(history: &History, count: usize) -> Vec<Change> {
    // Transactions of other tests may delay the latest ones.
    wait_for("all changes", async || {
        Some(changes_from(history, 0, 100).await).filter(|changes| changes.len() >= count)
    })
    .await
}

/// Waits until a change would be later than all before. In a file, times are in milliseconds.
async fn wait_until_clock_advances(history: &History) {
    let before = history.now().await.unwrap();
    let is_later = async || history.now().await.unwrap() > before;
    wait_until("the clock advances", is_later).await;
}

async fn sessions(history: &History, id: i64, query: SessionQuery) -> Vec<Session> {
    history.sessions(id, query, 1_000).await.unwrap().sessions
}

async fn each_change_is_recorded_once(backend: &Backend) {
    let store = backend.open().await;
    let history = History::new(&backend.config());
    assert_eq!(history.extent().await.unwrap(), None);
    store.record_seen(&[seen(1, 4 * HOUR), seen(2, 2 * HOUR)]).await.unwrap();
    let recorded = store.record_seen(&[seen(1, 2 * HOUR), seen(3, 2 * HOUR)]).await.unwrap();
    let gone = store.delete_stale(store.now().await.unwrap().before(HOUR), 10).await.unwrap();
    assert_eq!(gone.len(), 3);
    store.record_seen(&[seen(2, Duration::ZERO)]).await.unwrap();

    let changes = all_changes(&history, 7).await;
    let of_object = |id| changes.iter().filter(move |change| change.id == id);
    for (id, expected) in [
        (1, &[Presence::Online, Presence::Gone][..]),
        (2, &[Presence::Online, Presence::Gone, Presence::Online]),
        (3, &[Presence::Online, Presence::Gone]),
    ] {
        let kinds: Vec<Presence> = of_object(id).map(|change| change.presence).collect();
        assert_eq!(kinds, expected, "{id}");
    }
    assert!(changes.is_sorted_by_key(|change| change.at));
    for row in &gone {
        let last = of_object(row.id).rfind(|change| change.presence == Presence::Gone).unwrap();
        assert_eq!(last.last_seen, row.last_seen);
    }
    let inserted = of_object(3).next().unwrap();
    assert_eq!(inserted.last_seen, recorded.inserted[0].last_seen);
    assert!(history.now().await.unwrap() >= changes[6].at);
    let extent = history.extent().await.unwrap().unwrap();
    assert_eq!((extent.first, extent.last), (changes[0], changes[6]));
    assert_eq!(history.latest(1).await.unwrap(), of_object(1).next_back().copied());
    assert_eq!(history.latest(4).await.unwrap(), None);
}

/// The store may write before its monitor has looked at the history.
async fn first_change_after_a_start_is_recorded(backend: &Backend) {
    let database = backend.database();
    ready(&Store::start(database.clone(), "test", 1)).await;
    let history = History::new(&backend.config());
    for id in 1..=10 {
        let store = Store::start(database.clone(), "test", 1);
        wait_for("the object is recorded", async || {
            store.record_seen(&[seen(id, HOUR)]).await.ok()
        })
        .await;
        assert!(history.latest(id).await.unwrap().is_some(), "{id}");
    }
}

async fn sessions_are_listed_newest_first_in_pages(backend: &Backend) {
    let store = backend.open().await;
    let history = History::new(&backend.config());
    come_and_go(&store, 1..=2, 5).await;
    insert(&store, 1..=1, HOUR).await;

    let all = history.sessions(1, SessionQuery::default(), 10).await.unwrap();
    assert_eq!((all.sessions.len(), all.next), (6, None));
    assert!(all.sessions[0].online_at.is_some() && all.sessions[0].gone_at.is_none());
    for pair in all.sessions.windows(2) {
        assert!(pair[1].gone_at.unwrap() <= pair[0].online_at.unwrap(), "{pair:?}");
        assert!(pair[1].last_seen.is_some());
    }
    for limit in 1..=6 {
        let (mut paged, mut after) = (Vec::new(), None);
        loop {
            let query = SessionQuery { after, ..SessionQuery::default() };
            let SessionPage { sessions, next } = history.sessions(1, query, limit).await.unwrap();
            assert!(sessions.len() <= limit);
            paged.extend(sessions);
            after = next;
            if next.is_none() {
                break;
            }
        }
        assert_eq!(paged, all.sessions, "{limit}");
    }
    assert_eq!(sessions(&history, 3, SessionQuery::default()).await, []);
}

async fn sessions_of_weeks_are_listed_in_pages(backend: &Backend) {
    let store = backend.open().await;
    let history = History::new(&backend.config());
    for days in [17, 3, 0] {
        come_and_go(&store, 1..=1, 2).await;
        backend.age_history(days).await;
    }
    let all = history.sessions(1, SessionQuery::default(), 10).await.unwrap();
    assert_eq!((all.sessions.len(), all.next), (6, None));
    let days = |session: &Session| {
        let newest = all.sessions[0].online_at.unwrap();
        newest.ahead_of(session.online_at.unwrap()).as_secs() / (24 * 3_600)
    };
    assert_eq!(all.sessions.iter().map(days).collect::<Vec<_>>(), [0, 0, 3, 3, 20, 20]);
    let mut paged = Vec::new();
    let mut query = SessionQuery::default();
    loop {
        let page = history.sessions(1, query, 1).await.unwrap();
        paged.extend(page.sessions);
        query.after = page.next;
        if page.next.is_none() {
            break;
        }
    }
    assert_eq!(paged, all.sessions);
}

async fn sessions_are_filtered_by_time(backend: &Backend) {
    let store = backend.open().await;
    let history = History::new(&backend.config());
    come_and_go_at_different_times(&store, &history, 3).await;
    let all = sessions(&history, 1, SessionQuery::default()).await;
    let second = all[1];
    let since = SessionQuery { since: second.online_at, ..SessionQuery::default() };
    assert_eq!(sessions(&history, 1, since).await, all[..2]);
    let since = SessionQuery { since: second.gone_at, ..SessionQuery::default() };
    assert_eq!(sessions(&history, 1, since).await, all[..1]);
    let until = SessionQuery { until: second.gone_at, ..SessionQuery::default() };
    assert_eq!(sessions(&history, 1, until).await, all[1..]);
    let until = SessionQuery { until: second.online_at, ..SessionQuery::default() };
    assert_eq!(sessions(&history, 1, until).await, all[2..]);
    let both = SessionQuery { since: second.online_at, until: second.gone_at, after: None };
    assert_eq!(sessions(&history, 1, both).await, [second]);
}

async fn availability_counts_the_time_online_within_the_window(backend: &Backend) {
    let store = backend.open().await;
    let history = History::new(&backend.config());
    let unknown = history.availability(1, HOUR).await.unwrap();
    assert_eq!((unknown.online, unknown.sessions), (Duration::ZERO, 0));
    assert!(unknown.ratio().abs() < f64::EPSILON);
    come_and_go_at_different_times(&store, &history, 2).await;
    backend.age_history(1).await;
    insert(&store, 1..=2, 2 * HOUR).await;
    wait_until_clock_advances(&history).await;
    delete_stale(&store, HOUR, 10).await.unwrap();

    let all = sessions(&history, 1, SessionQuery::default()).await;
    let length = |session: &Session| session.gone_at.unwrap().ahead_of(session.online_at.unwrap());
    let whole = history.availability(1, 48 * HOUR).await.unwrap();
    assert_eq!((whole.online, whole.sessions), (all.iter().map(length).sum(), 3));
    // Nothing is known from before the first change.
    assert_eq!(Some(whole.since), all[2].online_at);
    let latest = history.availability(1, HOUR).await.unwrap();
    assert_eq!((latest.online, latest.sessions), (length(&all[0]), 1));
    assert_eq!(latest.until.ahead_of(latest.since), HOUR);
    // A session that has not ended counts until now.
    insert(&store, 3..=3, HOUR).await;
    wait_until_clock_advances(&history).await;
    let current = history.availability(3, HOUR).await.unwrap();
    let begun = sessions(&history, 3, SessionQuery::default()).await[0].online_at.unwrap();
    assert_eq!(current.online, current.until.ahead_of(begun));
}

async fn positions_outside_the_history_are_recognised(backend: &Backend) {
    let store = backend.open().await;
    let history = History::new(&backend.config());
    assert!(history.has_all_after(0).await.unwrap());
    assert!(!history.has_all_after(7).await.unwrap());
    assert_eq!(history.settled().await.unwrap(), 0);
    come_and_go(&store, 1..=2, 1).await;
    backend.age_history(31).await;
    come_and_go(&store, 3..=4, 1).await;
    let all = all_changes(&history, 8).await;
    for change in &all {
        assert!(history.has_all_after(change.position).await.unwrap());
    }
    assert!(!history.has_all_after(all[7].position + 1).await.unwrap());
    assert_eq!(history.settled().await.unwrap(), all[7].position);
    while store.maintain_history().await.unwrap() {}
    for (index, change) in all.iter().enumerate() {
        // The client of the last deleted change has not missed one.
        assert_eq!(history.has_all_after(change.position).await.unwrap(), index >= 3, "{index}");
    }
    assert!(history.has_all_after(0).await.unwrap());
}

/// Another program may write the table too. It records no changes.
async fn missing_changes_end_or_begin_a_session(backend: &Backend) {
    let history = History::new(&backend.config());
    let off = Retention { history_retention: Duration::ZERO };
    let (on, off) = backend.open_with_retentions(Retention::default(), off).await;
    insert(&off, 1..=1, 2 * HOUR).await;
    delete_stale(&on, HOUR, 10).await.unwrap();
    come_and_go(&on, 1..=1, 1).await;
    insert(&on, 1..=1, 2 * HOUR).await;
    delete_stale(&off, HOUR, 10).await.unwrap();
    insert(&on, 1..=1, 2 * HOUR).await;

    let sessions = sessions(&history, 1, SessionQuery::default()).await;
    let [current, not_ended, complete, not_begun] = sessions.as_slice() else {
        panic!("{sessions:?}");
    };
    assert_eq!(current.gone_at, None);
    assert_eq!(not_ended.gone_at, current.online_at);
    assert!(complete.online_at <= complete.gone_at && complete.gone_at <= not_ended.online_at);
    assert_eq!(not_begun.online_at, None);
    assert!(not_begun.gone_at <= complete.online_at);
}

async fn changes_are_read_in_pages_from_any_position(backend: &Backend) {
    let store = backend.open().await;
    let history = History::new(&backend.config());
    come_and_go(&store, 1..=25, 2).await;
    let all = all_changes(&history, 100).await;
    assert!(all.is_sorted_by(|one, other| one.position < other.position));
    for start in [0, 1, 50, 99] {
        let position = if start == 0 { 0 } else { all[start - 1].position };
        for limit in [1, 7, 100] {
            assert_eq!(changes_from(&history, position, limit).await, all[start..], "{limit}");
        }
    }
    let page = history.changes_after(all[89].position, 10).await.unwrap();
    assert!(!page.has_more);
    let page = history.changes_after(all[88].position, 10).await.unwrap();
    assert!(page.has_more);
    assert_eq!(history.changes_after(all[99].position, 10).await.unwrap().changes, []);
    assert_eq!(history.changes_after(i64::MAX, 10).await.unwrap().changes, []);
}

async fn reader_of_concurrent_changes_skips_and_repeats_none(backend: &Backend) {
    const ROUNDS: usize = 40;
    let (one, other) = backend.open_two().await;
    let history = History::new(&backend.config());
    // Both stores insert and delete the same objects, so transactions wait for each other and
    // commit in another order than that of their positions.
    let write = async |store: &Store| {
        for _ in 0..ROUNDS {
            // A deadlock between an upsert and a cleanup is impossible, because a cleanup never
            // waits.
            insert(store, 1..=50, 2 * HOUR).await;
            delete_stale(store, HOUR, 20).await.unwrap();
        }
    };
    let is_done = std::sync::atomic::AtomicBool::new(false);
    let writing = async {
        tokio::join!(write(&one), write(&other), write(&one), write(&other));
        is_done.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    let reading = async {
        let (mut read, mut position) = (Vec::new(), 0);
        loop {
            let was_done = is_done.load(std::sync::atomic::Ordering::Relaxed);
            let page = history.changes_after(position, 37).await.unwrap();
            position = page.changes.last().map_or(position, |last| last.position);
            read.extend(page.changes);
            let last = history.extent().await.unwrap().map_or(0, |extent| extent.last.position);
            if was_done && position >= last {
                return read;
            }
            tokio::task::yield_now().await;
        }
    };
    let ((), read) = tokio::join!(writing, reading);
    assert_eq!(read, changes_from(&history, 0, 1_000).await);
    let mut latest = HashMap::new();
    for change in &read {
        let before = latest.insert(change.id, change.presence);
        assert_ne!(before.unwrap_or(Presence::Gone), change.presence, "{change:?}");
    }
    let online = latest.values().filter(|presence| **presence == Presence::Online).count();
    assert_eq!(online, backend.ids().await.len());
}

async fn objects_that_are_gone_are_listed_until_they_come_back(backend: &Backend) {
    let store = backend.open().await;
    let history = History::new(&backend.config());
    come_and_go(&store, 1..=5, 2).await;
    insert(&store, 3..=3, HOUR).await;
    insert(&store, 9..=9, HOUR).await;
    let long_ago = history.now().await.unwrap().minus(HOUR);
    let gone = async |since, first, limit| {
        let gone = history.gone_since(since, first, limit).await.unwrap();
        gone.iter().map(|change| change.id).collect::<Vec<_>>()
    };
    assert_eq!(gone(long_ago, i64::MIN, 10).await, [1, 2, 4, 5]);
    assert_eq!(gone(long_ago, 2, 2).await, [2, 4]);
    let last = history.latest(5).await.unwrap().unwrap();
    assert_eq!(history.gone_since(last.at, 5, 10).await.unwrap(), [last]);
    wait_until_clock_advances(&history).await;
    assert_eq!(gone(history.now().await.unwrap(), i64::MIN, 10).await, [0_i64; 0]);
}

async fn without_retention_nothing_is_recorded(backend: &Backend) {
    let off = Retention { history_retention: Duration::ZERO };
    let (off, also_off) = backend.open_with_retentions(off, off).await;
    come_and_go(&off, 1..=3, 2).await;
    assert!(!also_off.maintain_history().await.unwrap());
    assert_eq!(History::new(&backend.config()).extent().await.unwrap(), None);
}

async fn only_changes_older_than_the_retention_are_deleted(backend: &Backend) {
    let store = backend.open().await;
    let history = History::new(&backend.config());
    while store.maintain_history().await.unwrap() {}
    come_and_go(&store, 1..=3, 1).await;
    backend.age_history(31).await;
    come_and_go(&store, 4..=6, 1).await;
    assert_eq!(all_changes(&history, 12).await.len(), 12);
    while store.maintain_history().await.unwrap() {}
    let left = all_changes(&history, 6).await;
    assert!(left.iter().all(|change| (4..=6).contains(&change.id)), "{left:?}");
    assert_eq!(left.len(), 6);
    // The latest change stays.
    backend.age_history(31).await;
    while store.maintain_history().await.unwrap() {}
    let kept = changes_from(&history, 0, 10).await;
    assert_eq!(kept.last().map(|change| change.position), Some(left[5].position));
}
