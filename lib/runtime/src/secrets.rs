//! Masks the values of settings that may contain secrets in errors and logs.

use crate::settings::split_urls;

/// A setting whose name contains one of these may contain a secret.
const SECRET_NAMES: [&str; 5] = ["PASSWORD", "SECRET", "URI", "URL", "HEADERS"];
/// Settings that may contain several URLs, separated by commas.
const URL_LISTS: [&str; 2] = ["AMQP_URI", "VIEWER_METRICS"];
/// Longer values are truncated in messages.
const SHOWN_MAX: usize = 200;

/// The value as messages show it: `***` if it may contain a password, else one line of limited
/// length.
pub(crate) fn mask(name: &str, value: &str) -> String {
    // Even in a malformed URL, user and password come before an @. A query may contain a token.
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

/// The path in `NAME_FILE` as messages show it: `***` if it may be the secret itself.
pub(crate) fn mask_path(name: &str, path: &str) -> String {
    let is_path = ["/", "./", "../"].iter().any(|start| path.starts_with(start));
    if is_path || !is_secret(name) && !path.contains("://") {
        path.escape_debug().to_string()
    } else {
        "***".to_owned()
    }
}

/// The value without surrounding characters that tools add, such as the carriage return of a CRLF
/// file. A secret keeps its blanks, which may be part of it.
pub(crate) fn trim<'a>(name: &str, value: &'a str) -> &'a str {
    if is_secret(name) { value.trim_matches(['\r', '\n']) } else { value.trim() }
}

/// Rejects URLs with unescaped characters in the user or the password. A parser would treat part of
/// the password as the host or path, which messages show, or the hosts before an @ as the password.
///
/// # Errors
/// What is wrong and what to write instead, without the value.
pub(crate) fn check_urls(name: &str, value: &str) -> Result<(), String> {
    // Other secrets may contain any character.
    if is_secret(name) && !["URI", "URL"].iter().any(|part| name.contains(part)) {
        return Ok(());
    }
    if URL_LISTS.contains(&name) {
        split_urls(value).try_for_each(check_url)
    } else {
        check_url(value)
    }
}

fn check_url(value: &str) -> Result<(), String> {
    let Some((_, rest)) = value.split_once("://") else { return Ok(()) };
    if rest.contains("://") {
        return Err("expected one URL, but :// occurs twice".to_owned());
    }
    let end_of_authority = rest.find(['/', '?', '#', '\\']).unwrap_or(rest.len());
    if rest[end_of_authority..].contains('@') {
        return Err("the URL contains an @ after the first / ? # or \\. In a user or password, \
                   percent-encode these characters: / as %2F, ? as %3F, # as %23, \\ as %5C, \
                   @ as %40 and % as %25. In a path, write @ as %40"
            .to_owned());
    }
    let Some((user, _)) = rest[..end_of_authority].rsplit_once('@') else { return Ok(()) };
    if user.contains('@') {
        return Err("the URL contains more than one @ before its path. Write an @ in a user or \
                   password as %40. In a list of hosts, write USER:PASSWORD@ only before the first"
            .to_owned());
    }
    let mut escapes = user.split('%').skip(1);
    let is_escape =
        |text: &str| text.len() >= 2 && text.bytes().take(2).all(|digit| digit.is_ascii_hexdigit());
    if !escapes.all(is_escape) {
        return Err("the user or the password contains a % without two hexadecimal digits after \
                   it. Write % as %25"
            .to_owned());
    }
    Ok(())
}

fn is_secret(name: &str) -> bool {
    // `AMQP_CA` expects certificates, but may contain a private key by mistake.
    name == "AMQP_CA" || SECRET_NAMES.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field case 6.7.
    #[test]
    fn value_that_may_contain_a_secret_is_masked() {
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
    fn url_that_would_split_the_password_is_rejected() {
        for list in [
            "amqp://me:12,34/56@host",
            "amqp://me:s3cret@a,amqp://me:12/34@b",
            "amqp://me:s3cret@a,me:s3cret@b/%2f",
            "amqp://me:s3cret@a/%2f,amqp://me:s3cret%zz@b/%2f",
        ] {
            check_urls("AMQP_URI", list).unwrap_err();
        }
        for url in [
            "amqp://me:12/34@host:5672/",
            "amqp://me:12#34@host",
            "postgres://me:12?34@host/db",
            "postgres://me:12/34@a:1,b:2/db?target_session_attrs=any",
            "http://me:12\\34@host",
            "http://me:s3cret@one http://me:s3cret@two",
            "http://me:s3cret@one,http://me:s3cret@two",
            "http://me:s3@cret:12@host",
            "postgres://me:s3cret@a:1,me:s3cret@b:2/db",
            "http://me:s3cret%zz@host",
            "http://me:s3cret%4@host",
            "http://s3cret%:12@host",
            "http://me:s3cret%€@host",
        ] {
            let error = check_urls("TESTER_ENDPOINT", url).unwrap_err();
            assert!(!error.contains("12") && !error.contains("s3cret"), "{error}");
        }
        for (name, value) in [
            ("AMQP_URI", "amqp://me:12%2F34@host:5672/%2f"),
            ("AMQP_URI", "amqp://me:p%40ss,w@a,b/%2f"),
            ("VIEWER_METRICS", "http://a/100%"),
            ("AMQP_URI", "sqlite:/data/me@home.db"),
            ("DATABASE_URL", "postgres://me:s3cret@host/db?sslmode=require"),
            ("DATABASE_URL", "postgres://me:s3cret@a:1,[::1]:2/db?target_session_attrs=any"),
            ("POSTGRES_PASSWORD", "a://b/c@d"),
            ("VIEWER_METRICS", "http://a:1/metrics, http://b:1/metrics"),
            ("AMQP_URI", "amqp://me:s3cret@a,b:5673/%2f"),
            ("AMQP_URI", "amqp://me:s3cret@a/%2f,amqp://me:s3cret@b/%2f"),
        ] {
            assert_eq!(check_urls(name, value), Ok(()), "{value}");
        }
    }
}
