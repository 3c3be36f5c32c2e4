//! What a case is.

use std::pin::Pin;

use crate::figures::Verdict;

type Run = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Verdict>>> + Send>;

/// One fault, and how it is brought about.
pub(crate) struct Case {
    /// By which it is run alone. No name may contain another.
    pub(crate) name: &'static str,
    /// What happens, for the table.
    pub(crate) fault: &'static str,
    /// Whether it belongs to those that are quick, and cover most.
    pub(crate) runs_in_make_test: bool,
    pub(crate) run: Run,
}

impl Case {
    /// A case of `make faults` only.
    pub(crate) fn new<F>(name: &'static str, fault: &'static str, run: fn() -> F) -> Self
    where
        F: Future<Output = Verdict> + 'static,
    {
        let run: Run = Box::new(move || Box::pin(run()));
        Self { name, fault, runs_in_make_test: false, run }
    }

    /// Runs it in `make test` too.
    pub(crate) fn in_make_test(self) -> Self {
        Self { runs_in_make_test: true, ..self }
    }
}
