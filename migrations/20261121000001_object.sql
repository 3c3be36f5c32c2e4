-- The Go services may have created the table; then it stays unchanged.
--
-- There is deliberately no index on last_seen: every upsert changes that column, and an index on it
-- would prevent HOT updates, which write only the heap page. fillfactor reserves the space on each
-- page that HOT updates need. Vacuum starts after a small share of changed rows, because all rows
-- are rewritten again and again.
-- Decision: docs/decisions/0041-why-is-there-no-index-on-last-seen.md
CREATE TABLE IF NOT EXISTS object (
    id bigint PRIMARY KEY,
    last_seen timestamptz NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
