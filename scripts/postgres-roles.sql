-- Creates the roles of Lastseen's services, each with only the privileges that its statements need.
--
-- docker-compose.yml runs this script at each start of Postgres. Elsewhere, a superuser runs it in the
-- database, with the four passwords in the environment (psql 14 or later):
--
--   psql -d DATABASE -f scripts/postgres-roles.sql
--
-- The script can be run again: to change the passwords, for an existing table, or after the schema
-- `public` was recreated.
--
-- With POSTGRES_REVOKE_PUBLIC=yes, only these roles and superusers can connect to the database
-- afterwards. Set this variable if no other application uses the database. With
-- POSTGRES_ADMIN_PASSWORD, the role that runs the script gets that password.
\set ON_ERROR_STOP on
\getenv migration_password POSTGRES_MIGRATION_PASSWORD
\getenv consumer_password POSTGRES_CONSUMER_PASSWORD
\getenv routine_password POSTGRES_ROUTINE_PASSWORD
\getenv viewer_password POSTGRES_VIEWER_PASSWORD
\set revoke_public no
\getenv revoke_public POSTGRES_REVOKE_PUBLIC
\getenv admin_password POSTGRES_ADMIN_PASSWORD
SELECT :'revoke_public' = 'yes' AS is_ours_alone \gset

BEGIN;

SELECT format('CREATE ROLE %I', name)
FROM unnest(ARRAY[
    'lastseen_migration', 'lastseen_consumer', 'lastseen_routine', 'lastseen_viewer']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec
ALTER ROLE lastseen_migration LOGIN PASSWORD :'migration_password';
ALTER ROLE lastseen_consumer LOGIN PASSWORD :'consumer_password';
ALTER ROLE lastseen_routine LOGIN PASSWORD :'routine_password';
ALTER ROLE lastseen_viewer LOGIN PASSWORD :'viewer_password';

\if :{?admin_password}
ALTER ROLE CURRENT_USER PASSWORD :'admin_password';
\endif

-- By default, every role can connect and create temporary tables; before Postgres 15, it can create
-- any table. Another application may rely on these privileges.
\if :is_ours_alone
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database()) \gexec
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
\else
\warn Every role can still connect to this database and create temporary tables. If no other application uses it, set POSTGRES_REVOKE_PUBLIC=yes and run this again.
\endif
SELECT format(
    'GRANT CONNECT ON DATABASE %I TO lastseen_migration, lastseen_consumer, lastseen_routine, lastseen_viewer',
    current_database()) \gexec
GRANT USAGE, CREATE ON SCHEMA public TO lastseen_migration;
GRANT USAGE ON SCHEMA public TO lastseen_consumer, lastseen_routine, lastseen_viewer;

-- Default privileges also apply when the table is created again, whereas a grant disappears with its
-- table. They also apply to the table of the migrations.
--
-- The consumer's upsert inserts, updates, and reads the row that it may update. The routine reads stale
-- rows, locks them (FOR UPDATE SKIP LOCKED), for which Postgres requires the UPDATE privilege, and
-- deletes them. The viewer only reads.
ALTER DEFAULT PRIVILEGES FOR ROLE lastseen_migration
    GRANT SELECT, INSERT, UPDATE ON TABLES TO lastseen_consumer;
ALTER DEFAULT PRIVILEGES FOR ROLE lastseen_migration
    GRANT SELECT, UPDATE, DELETE ON TABLES TO lastseen_routine;
ALTER DEFAULT PRIVILEGES FOR ROLE lastseen_migration
    GRANT SELECT ON TABLES TO lastseen_viewer;

-- Takes over a table that another role has created.
ALTER TABLE IF EXISTS object OWNER TO lastseen_migration;
ALTER TABLE IF EXISTS _lastseen_migrations OWNER TO lastseen_migration;
SELECT unnest(ARRAY[
    'GRANT SELECT, INSERT, UPDATE ON object TO lastseen_consumer',
    'GRANT SELECT, UPDATE, DELETE ON object TO lastseen_routine',
    'GRANT SELECT ON object TO lastseen_viewer'])
WHERE to_regclass('object') IS NOT NULL \gexec

-- The history: the consumer and the routine only insert, the viewer only reads. The migration, which creates
-- the table, grants the same.
SELECT format('ALTER TABLE %s OWNER TO lastseen_migration', relid)
FROM pg_partition_tree(to_regclass('presence_change')) \gexec
SELECT format('ALTER FUNCTION %s OWNER TO lastseen_migration', function)
FROM unnest(ARRAY[
    to_regprocedure('presence_change_maintain(interval)'),
    to_regprocedure('presence_change_restrict(regclass)')]) AS function
WHERE function IS NOT NULL \gexec
SELECT unnest(ARRAY[
    'GRANT INSERT ON presence_change TO lastseen_consumer, lastseen_routine',
    'GRANT SELECT ON presence_change TO lastseen_viewer',
    'GRANT EXECUTE ON FUNCTION presence_change_maintain(interval) TO lastseen_routine'])
WHERE to_regclass('presence_change') IS NOT NULL \gexec

COMMIT;
