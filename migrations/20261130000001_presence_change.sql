-- The history: one row for each time that an object came online or was gone. Rows are only inserted, by
-- the statement that inserts the object's row or deletes it. Partitions make it cheap to drop old rows.
--
-- `position` gives the order of the changes of each object. It begins at the microseconds since 1970, so
-- that no two histories, such as those before and after the table is dropped, have positions in common.
-- `at` is read when the row is written: unlike now(), it comes after a wait for the lock of the object.
-- Decision: docs/decisions/0087-how-is-the-history-recorded.md
IF to_regclass('presence_change') IS NULL THEN
    EXECUTE format(
        'CREATE TABLE presence_change (
             position bigint NOT NULL GENERATED ALWAYS AS IDENTITY (START WITH %s),
             object_id bigint NOT NULL,
             at timestamptz NOT NULL DEFAULT clock_timestamp(),
             last_seen timestamptz NOT NULL,
             is_online boolean NOT NULL
         ) PARTITION BY RANGE (at)',
        (extract(epoch FROM clock_timestamp()) * 1000000)::bigint);
    CREATE INDEX presence_change_position ON presence_change (position);
    -- Without a second column, which would double the cost of this index.
    CREATE INDEX presence_change_object ON presence_change (object_id);
    -- For rows of a day without a partition: without it, no object could come online on such a day.
    CREATE TABLE presence_change_default PARTITION OF presence_change DEFAULT;
END IF;

-- Drops one partition whose rows are all older than `retention`, or deletes up to 10,000 such rows from the
-- default partition, or creates one partition of the next days. Returns whether there may be more to do, in
-- another transaction, so that no lock of the table is held for long. The latest row stays, so that its
-- position is known. Only the owner of a table may create or drop its partitions, so other roles call this
-- function.
CREATE OR REPLACE FUNCTION presence_change_maintain(retention interval) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET lock_timeout = '200ms' SET timezone = 'UTC' SET datestyle = 'ISO' AS $function$
DECLARE
    today date := now()::date;
    first_kept date := (now() - retention)::date;
    latest bigint := (SELECT max(position) FROM presence_change);
    partition text;
    day date;
    deleted bigint;
BEGIN
    -- If another session is maintaining the table, there is nothing to do.
    IF NOT pg_try_advisory_xact_lock(hashtextextended('lastseen: presence_change'::text, 0::bigint)) THEN
        RETURN false;
    END IF;
    FOR partition, day IN
        SELECT relname::text, to_date(right(relname::text, 8), 'YYYYMMDD'::text) AS of_day
        FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = 'presence_change'::regclass AND relname::text ~ '^presence_change_\d{8}$'::text
          AND to_date(right(relname::text, 8), 'YYYYMMDD'::text) < first_kept
        ORDER BY of_day
    LOOP
        IF EXISTS (SELECT FROM presence_change WHERE at >= (day + 1)::timestamptz) THEN
            EXECUTE format('DROP TABLE %I'::text, partition);
            RETURN true;
        END IF;
    END LOOP;
    DELETE FROM presence_change_default WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM presence_change_default
        WHERE at < now() - retention AND position < latest LIMIT 10000));
    GET DIAGNOSTICS deleted = ROW_COUNT;
    IF deleted > 0 THEN
        RETURN true;
    END IF;
    FOR day IN SELECT today + ahead FROM generate_series(0, 7) AS ahead LOOP
        partition := 'presence_change_' || to_char(day::timestamp, 'YYYYMMDD'::text);
        CONTINUE WHEN to_regclass(partition) IS NOT NULL;
        BEGIN
            EXECUTE format(
                'CREATE TABLE %I PARTITION OF presence_change FOR VALUES FROM (%L) TO (%L)'::text,
                partition, day::timestamptz, (day + 1)::timestamptz);
            PERFORM presence_change_restrict(partition);
            RETURN true;
        EXCEPTION WHEN check_violation THEN
            -- The default partition already has rows of that day.
            NULL;
        END;
    END LOOP;
    RETURN false;
END $function$;

-- Revokes what the default privileges of the schema grant on a new table. Rows are written and read through
-- `presence_change`, whose privileges then apply also to its partitions.
CREATE OR REPLACE FUNCTION presence_change_restrict(partition regclass) RETURNS void
LANGUAGE plpgsql AS $function$
DECLARE
    other text;
BEGIN
    FOR other IN
        SELECT DISTINCT grantee::regrole::text FROM pg_class, aclexplode(relacl)
        WHERE pg_class.oid = partition AND grantee NOT IN (relowner, 0)
    LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s', partition, other);
    END LOOP;
END $function$;

-- The schema is fixed, because whoever calls a function of the owner must not choose its tables.
EXECUTE format(
    'ALTER FUNCTION presence_change_maintain(interval) SET search_path = %I, pg_temp', current_schema());
REVOKE ALL ON FUNCTION presence_change_maintain(interval), presence_change_restrict(regclass) FROM PUBLIC;
PERFORM presence_change_restrict('presence_change');
PERFORM presence_change_restrict('presence_change_default');
-- The roles of scripts/postgres-roles.sql, if they exist.
DECLARE
    right_of_role text;
BEGIN
    FOREACH right_of_role IN ARRAY ARRAY[
        'INSERT ON presence_change TO lastseen_consumer',
        'INSERT ON presence_change TO lastseen_routine',
        'EXECUTE ON FUNCTION presence_change_maintain(interval) TO lastseen_routine',
        'SELECT ON presence_change TO lastseen_viewer']
    LOOP
        IF to_regrole(split_part(right_of_role, ' TO ', 2)) IS NOT NULL THEN
            EXECUTE 'GRANT ' || right_of_role;
        END IF;
    END LOOP;
END;
-- For the next days; it drops nothing.
FOR days_ahead IN 0..7 LOOP
    PERFORM presence_change_maintain('100 years');
END LOOP;
