//! A fault case.

use std::pin::Pin;

use crate::figures::Verdict;

type Run = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Verdict>>> + Send>;

/// One fault and the function that causes and measures it.
pub(crate) struct Case {
    /// The name, which selects the case on the command line. No name may contain another one.
    pub(crate) name: &'static str,
    /// The fault, for the table.
    pub(crate) fault: &'static str,
    /// Whether `make test` runs the case, and not only `make faults`.
    pub(crate) runs_in_make_test: bool,
    pub(crate) run: Run,
}

impl Case {
    /// A case that only `make faults` runs.
    pub(crate) fn new<F>(name: &'static str, run: impl Fn() -> F + Send + 'static) -> Self
    where
        F: Future<Output = Verdict> + 'static,
    {
        let run: Run = Box::new(move || Box::pin(run()));
        Self { name, fault: "", runs_in_make_test: false, run }
    }

    /// Names the fault, for the table.
    pub(crate) fn fault(self, fault: &'static str) -> Self {
        Self { fault, ..self }
    }

    /// Makes `make test` run the case, too.
    pub(crate) fn in_make_test(self) -> Self {
        Self { runs_in_make_test: true, ..self }
    }
}
