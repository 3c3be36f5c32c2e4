//! Sets up the log, as text or JSON lines, on standard error.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::time::ChronoLocal;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::reload::Handle;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::log_output;
use crate::log_output::LogOutput;
use crate::repeat_filter::RepeatFilter;

const DEFAULT_FILTER: &str = "info,sqlx::postgres::notice=warn";
/// The default for a command. Informational lines would clutter its output.
const COMMAND_FILTER: &str = "warn";
/// Added to every filter. Lastseen logs each lost connection once, where it is handled. lapin would
/// log it several times, and at level trace would log the frame that contains the password.
const ALWAYS: &str = "lapin=off";

/// The format of log lines.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// One line of readable text per event.
    Text,
    /// One JSON object per line.
    Json,
}

/// What to log, and in which format.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Logs")]
#[group(skip)]
pub(crate) struct Config {
    /// Format of log lines
    #[arg(long, value_enum, ignore_case = true, default_value = "text")]
    log_format: LogFormat,
    /// What to log: a level, or comma-separated `target=level`, such as `info`, `debug`,
    /// `info,consumer=debug`
    #[arg(long, default_value = DEFAULT_FILTER, value_parser = filter)]
    rust_log: String,
}

impl Config {
    /// The settings for a command, which logs only warnings unless the settings say otherwise.
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
    let expected = "expected levels such as info or info,consumer=debug";
    // `EnvFilter` treats an unknown word as a target, and would then log all lines of that target
    // and no others.
    let mut directives = text.split(',').map(str::trim).filter(|directive| !directive.is_empty());
    let is_target = |directive: &&str| {
        !directive.contains(['=', '[']) && directive.parse::<LevelFilter>().is_err()
    };
    if let Some(word) = directives.find(is_target) {
        let start: String = word.chars().take(4).collect::<String>().to_lowercase();
        let level = ["error", "warn", "info", "debug", "trace"]
            .into_iter()
            .find(|level| start.len() >= 4 && level.starts_with(&start));
        let instead = level.map_or_else(|| format!("{word}=debug"), str::to_owned);
        return Err(format!("{expected}; {word} is not a level; write {instead}"));
    }
    // In the fields of a span filter, blanks are significant.
    let text = if text.contains('[') { text.to_owned() } else { text.replace(' ', "") };
    let parsed = EnvFilter::try_new(&text);
    parsed.map(|_| text).map_err(|error| format!("{expected} ({error})"))
}

pub(crate) const RELOADABLE: &[&str] = &["RUST_LOG"];

pub(crate) struct Filter(Box<dyn Fn(EnvFilter) + Send>);

impl Filter {
    fn of<S: 'static>(handle: Handle<EnvFilter, S>) -> Self {
        // Cannot fail: the subscriber lives as long as the process.
        Self(Box::new(move |filter| _ = handle.reload(filter)))
    }

    pub(crate) fn set(&self, config: &Config) {
        (self.0)(config.filter());
    }
}

/// Installs the log subscriber for the whole process. Times are in the zone of `TZ`.
pub(crate) fn init(config: &Config) -> Filter {
    // Panics must be logged, because the default hook writes to standard error directly and would
    // block if nobody reads it.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        let message = panic.payload_as_str().unwrap_or_default();
        tracing::error!(place, "panic: {message}");
    }));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(config.filter())
        .with_timer(ChronoLocal::rfc_3339())
        .with_writer(|| LogOutput)
        .with_ansi(log_output::is_terminal())
        // Otherwise the subscriber panics when the terminal or pipe is gone.
        .log_internal_errors(false);
    match config.log_format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let filter = Filter::of(builder.reload_handle());
            builder.finish().with(RepeatFilter).init();
            filter
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let filter = Filter::of(builder.reload_handle());
            builder.finish().with(RepeatFilter).init();
            filter
        }
    }
}
