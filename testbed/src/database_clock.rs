//! A database's clock, to set.

use std::time::Duration;

use sqlx::PgPool;

/// The clock of one database, which its sessions see in place of the server's: `now()` and
/// `clock_timestamp()` of a schema that they look through before Postgres's own.
#[derive(Debug)]
pub struct DatabaseClock {
    pool: PgPool,
}

impl DatabaseClock {
    /// Gives the database such a clock, which goes right. Sessions that are there already do not see
    /// it.
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

    /// Sets it ahead of the right time.
    pub async fn set_ahead(&self, step: Duration) {
        self.set(step.as_secs_f64()).await;
    }

    /// Sets it behind the right time.
    pub async fn set_behind(&self, step: Duration) {
        self.set(-step.as_secs_f64()).await;
    }

    /// Sets it right.
    pub async fn reset(&self) {
        self.set(0.0).await;
    }

    async fn set(&self, seconds: f64) {
        let set = "UPDATE public.wrong_by SET step = make_interval(secs => $1)";
        let set = sqlx::query(set).bind(seconds).execute(&self.pool).await;
        set.expect("a database's clock should be settable");
    }
}
