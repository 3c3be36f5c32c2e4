-- If the Go services have already created the table, it stays unchanged.
--
-- There is deliberately no index on last_seen: every upsert changes that column, and an index on it
-- would prevent HOT updates, which write only the heap page. HOT updates need free space on each
-- page, which fillfactor reserves. Vacuum starts when only a small share of the rows has changed,
-- because all rows are rewritten again and again.
-- Decision: docs/decisions/0041-why-is-there-no-index-on-last-seen.md
CREATE TABLE IF NOT EXISTS object (
    id bigint PRIMARY KEY,
    last_seen timestamptz NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
