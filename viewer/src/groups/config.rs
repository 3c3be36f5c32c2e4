//! The settings of groups.

use std::path::PathBuf;

use groups::Weights;
use runtime::settings;

/// The definition of groups, and how the viewer derives their statuses.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Groups")]
#[group(skip)]
pub struct GroupsConfig {
    /// File that defines groups of objects as JSON, or a directory whose *.json files do, including
    /// those of its subdirectories; a change takes effect within seconds [default: no groups]
    #[arg(long)]
    pub groups_file: Option<PathBuf>,
    /// How much an object of each kind weighs as the cause of a bad status, from 0 to 1000; objects
    /// of a kind with weight 0 count as up
    #[arg(long, default_value = "online=0,late=0,maintenance=0,never_seen=1,given_up=2,gone=3")]
    pub groups_weights: Weights,
    /// How many levels of groups have a metric of their own, `lastseen_group_status`; at most 1,000
    /// groups have one
    #[arg(long, value_parser = settings::number(0..=100_usize), default_value = "1")]
    pub groups_metrics_depth: usize,
    /// File in which the viewer saves the parsed groups, for its next start [default: none; for
    /// lastseen: groups.cache in `LASTSEEN_DIR`]
    #[arg(long, value_parser = cache_file)]
    pub groups_cache: Option<PathBuf>,
}

fn cache_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.file_name().is_none() || text.ends_with('/') || path.is_dir() {
        return Err("expected the path of a file, such as /var/lib/lastseen/groups.cache".into());
    }
    Ok(path)
}
