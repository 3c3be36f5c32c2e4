//! All cases, a file for each part that fails.

use crate::case::Case;

mod broker;
mod cluster;
mod consumer;
mod database;
mod machine;
mod producer;
mod routine;
mod status_api;
mod viewer;

/// All cases, in the order of the table.
pub(crate) fn all() -> Vec<Case> {
    let parts = [
        broker::cases(),
        cluster::cases(),
        producer::cases(),
        consumer::cases(),
        database::cases(),
        status_api::cases(),
        routine::cases(),
        machine::cases(),
        viewer::cases(),
    ];
    parts.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn each_case_can_be_run_alone_because_no_name_contains_another() {
        let names: Vec<&str> = super::all().iter().map(|case| case.name).collect();
        for name in &names {
            let matched = names.iter().filter(|other| other.contains(name)).count();
            assert_eq!(matched, 1, "`make faults CASE={name}` would run {matched} cases");
        }
    }
}
