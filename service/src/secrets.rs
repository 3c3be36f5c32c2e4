//! Which settings may hold secrets, and how their values appear in errors and logs.

/// Parts of the names of settings whose value is, or may contain, a secret.
const SECRET_NAMES: [&str; 5] = ["PASSWORD", "SECRET", "URI", "URL", "HEADERS"];
/// Longer values are cut in messages.
const SHOWN_MAX: usize = 200;

/// The value as it may be shown: not at all where a password may be in it, and on one line of limited length.
pub(crate) fn mask(name: &str, value: &str) -> String {
    // A user and password come before an @, wherever a careless URL puts it; and a query may hold a token.
    if is_secret(name) || value.contains('@') {
        return "***".to_owned();
    }
    let shown = match value.find(['?', '#']) {
        Some(query) if value.contains("://") => format!("{}***", &value[..=query]),
        _ => value.to_owned(),
    };
    let mut escaped: String = shown.escape_debug().take(SHOWN_MAX).collect();
    if shown.len() > SHOWN_MAX {
        escaped.push('…');
    }
    escaped
}

/// The path in `NAME_FILE`, unless the secret itself may have been written there.
pub(crate) fn mask_path(name: &str, path: &str) -> String {
    let is_path = ["/", "./", "../"].iter().any(|start| path.starts_with(start));
    if is_path || !is_secret(name) && !path.contains("://") {
        path.escape_debug().to_string()
    } else {
        "***".to_owned()
    }
}

/// The value without what a careless tool has put around it, such as the carriage return of a CRLF file. Blanks
/// may be part of a password.
pub(crate) fn trim<'a>(name: &str, value: &'a str) -> &'a str {
    if is_secret(name) { value.trim_matches(['\r', '\n']) } else { value.trim() }
}

/// Rejects URLs that parsers would split elsewhere than their author meant, so that part of a password
/// becomes the host or the path, and is shown as such.
///
/// # Errors
/// What is wrong and what to write instead, without the value.
pub(crate) fn check_urls(name: &str, value: &str) -> Result<(), String> {
    // Every character may be in these.
    if is_secret(name) && !["URI", "URL"].iter().any(|part| name.contains(part)) {
        return Ok(());
    }
    // Where several URLs are allowed, a comma separates them, and nobody logs in there.
    let urls = value.split(',').map(str::trim).filter(|_| name == "VIEWER_METRICS");
    let mut urls: Vec<&str> = urls.collect();
    if urls.is_empty() {
        urls.push(value);
    }
    urls.into_iter().try_for_each(check_url)
}

fn check_url(value: &str) -> Result<(), String> {
    let Some((_, rest)) = value.split_once("://") else { return Ok(()) };
    if rest.contains("://") {
        return Err("expected one URL, but :// occurs twice".to_owned());
    }
    let end_of_authority = rest.find(['/', '?', '#', '\\']).unwrap_or(rest.len());
    if rest[end_of_authority..].contains('@') {
        return Err("an @ comes after the first / ? # or \\ of the URL. In a user or password write these \
                    characters percent-encoded: / as %2F, ? as %3F, # as %23, \\ as %5C, @ as %40 and % as %25; in a \
                    path write @ as %40"
            .to_owned());
    }
    Ok(())
}

fn is_secret(name: &str) -> bool {
    // Where certificates are expected, somebody may have put the key.
    name == "AMQP_CA" || SECRET_NAMES.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field case 6.7.
    #[test]
    fn a_value_is_shown_only_where_no_secret_can_be_in_it() {
        for (name, value, shown) in [
            ("MAX_CONSUMERS", "0", "0"),
            ("AMQP_URI", "amqp://host", "***"),
            ("TESTER_ENDPOINT", "ftp://me:s3cret@host", "***"),
            ("TESTER_ENDPOINT", "me:s3c@ret", "***"),
            ("TESTER_ENDPOINT", "ftp://host/v1?key=s3cret", "ftp://host/v1?***"),
            ("QUEUE_NAME", "a\nb", "a\\nb"),
        ] {
            assert_eq!(mask(name, value), shown, "{name}={value}");
        }
        assert_eq!(mask("QUEUE_NAME", &"€".repeat(1_000)).chars().count(), SHOWN_MAX + 1);
        assert_eq!(mask_path("POSTGRES_PASSWORD", "s3cret"), "***");
        assert_eq!(trim("POSTGRES_PASSWORD", " a \r\n"), " a ");
        assert_eq!(trim("OBJECT_TTL", " 30s \r\n"), "30s");
        assert_eq!(mask_path("lastseen-config", "amqp://me:s3cret@host"), "***");
        assert_eq!(mask_path("POSTGRES_PASSWORD", "/run/secrets/x"), "/run/secrets/x");
    }

    /// Field case 6.7.
    #[test]
    fn a_url_that_would_be_split_within_the_password_is_rejected() {
        for url in [
            "amqp://me:12/34@host:5672/",
            "amqp://me:12#34@host",
            "postgres://me:12?34@host/db",
            "http://me:12\\34@host",
            "http://me:s3cret@one http://me:s3cret@two",
            "http://me:s3cret@one,http://me:s3cret@two",
        ] {
            let error = check_urls("TESTER_ENDPOINT", url).unwrap_err();
            assert!(!error.contains("12") && !error.contains("s3cret"), "{error}");
        }
        for (name, value) in [
            ("AMQP_URI", "amqp://me:12%2F34@host:5672/%2f"),
            ("AMQP_URI", "amqp://me:p@ss:w@host"),
            ("AMQP_URI", "sqlite:/data/me@home.db"),
            ("DATABASE_URL", "postgres://me:s3cret@host/db?sslmode=require"),
            ("POSTGRES_PASSWORD", "a://b/c@d"),
            ("VIEWER_METRICS", "http://a:1/metrics, http://b:1/metrics"),
        ] {
            assert_eq!(check_urls(name, value), Ok(()), "{value}");
        }
    }
}
