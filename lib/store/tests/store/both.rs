//! Tests that run on both databases: each function becomes one test for each database. The compiler
//! reports a function that is missing in its file's list as dead code.

/// Generates the tests, such as `both::opening::sqlite::NAME_OF_THE_FUNCTION`.
macro_rules! on_both {
    ($($case:ident,)*) => {
        mod postgres {
            $(#[tokio::test]
            async fn $case() {
                super::$case(&crate::backend::Backend::postgres().await).await;
            })*
        }
        mod sqlite {
            $(#[tokio::test]
            async fn $case() {
                super::$case(&crate::backend::Backend::sqlite()).await;
            })*
        }
    };
}

mod history;
mod objects;
mod opening;
mod sightings;
mod stale_rows;
