//! What holds for both databases alike: one function for each case, and of that a test for each
//! database. A function that is not in its file's list is dead code, which the compiler tells.

/// Makes the tests, such as `both::opening::sqlite::the_name_of_the_case`.
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

mod objects;
mod opening;
mod sightings;
mod stale_rows;
