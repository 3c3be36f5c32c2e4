//! Logs: text for people, JSON lines for machines, both on standard error.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::ChronoLocal;
use tracing_subscriber::reload::Handle;

use crate::terminal;

const DEFAULT_FILTER: &str = "info,sqlx::postgres::notice=warn";
/// The default of a command. Its output is its result, which log lines would only disturb.
const COMMAND_FILTER: &str = "warn";
/// Laid over every filter. lapin reports each lost connection itself, several times, and we log it
/// once, where it is handled; and at level trace it writes out the frame with the password.
const ALWAYS: &str = "lapin=off";

/// How log lines look.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// One readable line per event.
    Text,
    /// One JSON object per line.
    Json,
}

/// How and what to log.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Logs")]
#[group(skip)]
pub(crate) struct Config {
    /// How log lines look
    #[arg(long, value_enum, ignore_case = true, default_value = "text")]
    log_format: LogFormat,
    /// What to log, as level or `target=level`, comma-separated: `info`, `debug`, `info,consumer=debug`
    #[arg(long, default_value = DEFAULT_FILTER, value_parser = filter)]
    rust_log: String,
}

impl Config {
    /// What a command logs: warnings only, unless another filter was set than the default.
    pub(crate) fn of_command(self) -> Self {
        if self.rust_log != DEFAULT_FILTER {
            return self;
        }
        Self { rust_log: COMMAND_FILTER.to_owned(), ..self }
    }

    fn filter(&self) -> EnvFilter {
        EnvFilter::new(format!("{},{ALWAYS}", self.rust_log))
    }
}

fn filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text)
        .map(|_| text.to_owned())
        .map_err(|error| format!("expected levels such as info or info,consumer=debug ({error})"))
}

/// What of it can change while the process runs.
pub(crate) const LIVE: &[&str] = &["RUST_LOG"];

/// What is logged, to be changed.
pub(crate) struct Filter(Box<dyn Fn(EnvFilter) + Send>);

impl Filter {
    fn of<S: 'static>(handle: Handle<EnvFilter, S>) -> Self {
        // It fails when the subscriber is gone, which lives as long as the process.
        Self(Box::new(move |filter| _ = handle.reload(filter)))
    }

    pub(crate) fn set(&self, config: &Config) {
        (self.0)(config.filter());
    }
}

/// Installs the log subscriber for the whole process. Times are in the zone of `TZ`.
pub(crate) fn init(config: &Config) -> Filter {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(config.filter())
        .with_timer(ChronoLocal::rfc_3339())
        .with_writer(|| terminal::Log)
        .with_ansi(terminal::is_there())
        // It would panic over a terminal or a pipe that is gone.
        .log_internal_errors(false);
    match config.log_format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let filter = Filter::of(builder.reload_handle());
            builder.init();
            filter
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let filter = Filter::of(builder.reload_handle());
            builder.init();
            filter
        }
    }
}
