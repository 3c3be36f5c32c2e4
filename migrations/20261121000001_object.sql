-- The Go services may have created the table before: then it stays as it is.
--
-- There is no index on last_seen on purpose: every upsert changes that column, and an index on it
-- would end HOT updates, which cost nothing but the heap page. fillfactor leaves the room on each
-- page that HOT updates need, and the table is vacuumed by a small share of it because all of its
-- rows are rewritten again and again.
-- Decision: docs/decisions/0041-why-is-there-no-index-on-last-seen.md
CREATE TABLE IF NOT EXISTS object (
    id bigint PRIMARY KEY,
    last_seen timestamptz NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
