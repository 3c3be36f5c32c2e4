//! A database clock that a test can set.

use std::time::Duration;

use sqlx::PgPool;

/// The clock that sessions of one database see instead of the server's clock. It replaces `now()`
/// and `clock_timestamp()` with functions in a schema that precedes `pg_catalog` in the search
/// path.
#[derive(Debug)]
pub struct DatabaseClock {
    pool: PgPool,
}

impl DatabaseClock {
    /// Installs the clock with the correct time. Existing sessions do not see it.
    pub async fn install(pool: &PgPool) -> Self {
        let shadow = "
            CREATE TABLE public.wrong_by AS SELECT interval '0' AS step;
            CREATE FUNCTION public.now() RETURNS timestamptz STABLE LANGUAGE sql
                AS 'SELECT pg_catalog.now() + step FROM public.wrong_by';
            CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql
                AS 'SELECT pg_catalog.clock_timestamp() + step FROM public.wrong_by';
            DO $$ BEGIN
                EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
            END $$";
        sqlx::raw_sql(shadow).execute(pool).await.expect("a test may do anything in its database");
        Self { pool: pool.clone() }
    }

    /// Sets the clock ahead of the correct time.
    pub async fn set_ahead(&self, step: Duration) {
        self.set(step.as_secs_f64()).await;
    }

    /// Sets the clock behind the correct time.
    pub async fn set_behind(&self, step: Duration) {
        self.set(-step.as_secs_f64()).await;
    }

    /// Sets the clock to the correct time.
    pub async fn reset(&self) {
        self.set(0.0).await;
    }

    async fn set(&self, seconds: f64) {
        let set = "UPDATE public.wrong_by SET step = make_interval(secs => $1)";
        let set = sqlx::query(set).bind(seconds).execute(&self.pool).await;
        set.expect("a database's clock should be settable");
    }
}
