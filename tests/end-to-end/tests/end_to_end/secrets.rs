//! No secret leaks into a log, an error or a response, in any form.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use testkit::{
    Answer, Partner, PostgresCluster, Process, RabbitNode, Scratch, StatusApi, callback_endpoint,
    http_get, producer_address, wait_until,
};

/// The value of each secret. It contains characters that a URL must encode, so that the forms in
/// which it could leak differ.
const MARK: &str = "s3cret:Mark/€";

/// The settings that can contain a secret, with their values. `{mark}` stands for the
/// percent-encoded secret and `{plain}` for the secret itself.
const SECRETS: [(&str, &str); 4] = [
    ("AMQP_URI", "amqp://marked:{mark}@{broker}/%2f"),
    ("DATABASE_URL", "postgres://marked:{mark}@{database}/postgres"),
    ("POSTGRES_PASSWORD", "{plain}"),
    ("TESTER_ENDPOINT", "http://marked:{mark}@{status_api}"),
];

/// The same settings with invalid values.
const BAD: [(&str, &str); 6] = [
    ("AMQP_URI", "amqp://marked:{mark}@host:none/%2f"),
    ("AMQP_URI", "http://marked:{plain}@host"),
    ("DATABASE_URL", "postgres://marked:{mark}@host:none/x"),
    ("DATABASE_URL", "postgres://host/x?sslmode={plain}"),
    ("TESTER_ENDPOINT", "ftp://marked:{mark}@host"),
    ("TESTER_ENDPOINT", "http://marked:{plain}@"),
];

const BINARIES: [&str; 6] = ["producer", "consumer", "routine", "viewer", "tester", "lastseen"];

/// Host and port of each peer.
#[derive(Clone)]
struct Peers {
    broker: String,
    database: String,
    status_api: String,
}

impl Peers {
    /// Peers that are not reachable.
    fn unreachable() -> Self {
        let address = || format!("127.0.0.1:{}", testkit::free_port());
        Self { broker: address(), database: address(), status_api: address() }
    }

    fn fill(&self, template: &str) -> String {
        template
            .replace("{mark}", &percent_encoded())
            .replace("{plain}", MARK)
            .replace("{broker}", &self.broker)
            .replace("{database}", &self.database)
            .replace("{status_api}", &self.status_api)
    }

    /// All settings that can contain a secret, with `DATABASE_URL` or with the variables that it
    /// replaces.
    fn settings(&self, by_url: bool) -> BTreeMap<&'static str, String> {
        let mut settings: BTreeMap<_, _> =
            SECRETS.iter().map(|(name, value)| (*name, self.fill(value))).collect();
        if !by_url {
            settings.remove("DATABASE_URL");
            let (host, port) = self.database.split_once(':').unwrap();
            settings.insert("POSTGRES_USER", "marked".to_owned());
            settings.insert("POSTGRES_HOST", host.to_owned());
            settings.insert("POSTGRES_PORT", port.to_owned());
        }
        settings
    }
}

fn percent_encoded() -> String {
    url::form_urlencoded::byte_serialize(MARK.as_bytes()).collect()
}

/// The forms in which a secret could leak: as it is, escaped, percent-encoded, as bytes, and in
/// base64 at each of the three possible offsets within a longer text.
fn forms() -> Vec<String> {
    let mut forms = vec![MARK.to_owned(), percent_encoded(), MARK.escape_debug().to_string()];
    forms.push(MARK.escape_default().to_string());
    // `Debug` of bytes, the form in which lapin would log the login.
    forms.push(format!("{:?}", MARK.as_bytes()).trim_matches(['[', ']']).to_owned());
    // The part that a careless split at a special character leaves.
    forms.push("s3cret".to_owned());
    for before in ["", "x", "xx"] {
        let whole = STANDARD_NO_PAD.encode(format!("{before}{MARK}"));
        // The first and last characters depend on the surrounding text.
        forms.push(whole[4..whole.len() - 4].to_owned());
    }
    forms
}

/// Checks that `text` contains no secret.
fn assert_clean(what: &str, text: &str) {
    for form in forms() {
        let leak = text.lines().find(|line| line.contains(&form));
        assert!(leak.is_none(), "{what} contains {form:?}: {leak:?}");
    }
}

/// Checks that neither the log nor a response of the process contains a secret.
async fn assert_all_clean(what: &str, process: &Process) {
    for page in ["/livez", "/readyz", "/metrics", "/nowhere"] {
        let (_, body) = process.get(page).await;
        assert_clean(&format!("{what} at {page}"), &body);
    }
    assert_clean(&format!("{what}'s log"), &process.log().join("\n"));
}

fn spawn(
    binary: &str,
    mut settings: BTreeMap<&'static str, String>,
    arguments: &[&str],
) -> Process {
    for (name, value) in [
        ("RUST_LOG", "trace"),
        ("PRODUCER_ADDR", "127.0.0.1:0"),
        ("TESTER_ADDR", "127.0.0.1:0"),
        ("VIEWER_ADDR", "127.0.0.1:0"),
        ("MAX_ATTEMPTS", "1"),
    ] {
        settings.entry(name).or_insert_with(|| value.to_owned());
    }
    let settings: Vec<_> = settings.into_iter().collect();
    Process::spawn(binary, &settings, arguments)
}

/// The services that have secrets, with their arguments. The first two accept callbacks.
fn services() -> [(&'static str, &'static [&'static str]); 5] {
    [
        ("producer", &[]),
        ("lastseen", &["--no-tester"]),
        ("consumer", &[]),
        ("routine", &[]),
        ("viewer", &[]),
    ]
}

#[tokio::test]
async fn no_secret_leaks_in_normal_operation_or_on_failed_login() {
    let (broker, database) = tokio::join!(RabbitNode::start(), PostgresCluster::start());
    let escaped = MARK.replace('\'', "''");
    let role = format!("CREATE ROLE marked SUPERUSER LOGIN PASSWORD '{escaped}'");
    sqlx::query(sqlx::AssertSqlSafe(role)).execute(database.pool()).await.unwrap();
    database.require_passwords().await;
    broker.rabbitmqctl(&["add_user", "marked", MARK]).await;
    broker.rabbitmqctl(&["set_permissions", "marked", ".*", ".*", ".*"]).await;
    let status_api = StatusApi::start(|id, _| match id {
        0 => Answer::Status(500),
        _ => Answer::Online,
    });
    let peers = Peers {
        broker: format!("127.0.0.1:{}", broker.amqp_port()),
        database: format!("127.0.0.1:{}", database.port()),
        status_api: status_api.address().to_string(),
    };

    for by_url in [true, false] {
        let mut running = Vec::new();
        for (binary, arguments) in services() {
            let settings = peers.settings(by_url || binary == "lastseen");
            let process = spawn(binary, settings, arguments);
            process.ready().await;
            running.push((binary, process));
        }
        // One object is online, and the lookup of the other fails, so that it becomes a dead
        // letter.
        let looked_up = || [status_api.lookups_of(0), status_api.lookups_of(1)];
        let before = looked_up();
        for (binary, process) in &running[..2] {
            let endpoint = callback_endpoint(process).await;
            assert!(Partner::default().post(&endpoint, &[0, 1]).await, "{binary}");
        }
        wait_until("both are looked up", async || {
            let now = looked_up();
            now[0] >= before[0] + 2 && now[1] >= before[1] + 2
        })
        .await;
        for (binary, process) in &running {
            assert_all_clean(binary, process).await;
        }
        for arguments in [&["dead-letters", "list"][..], &["objects"], &["migrate", "--once"]] {
            let command = spawn("lastseen", peers.settings(true), arguments);
            assert_eq!(command.wait().await.code(), Some(0), "{arguments:?}");
            assert_clean(arguments[0], &command.log().join("\n"));
        }
        for (binary, process) in running {
            process.terminate();
            process.wait().await;
            assert_clean(binary, &process.log().join("\n"));
        }
    }

    // The same secret, and servers that reject it.
    sqlx::query("ALTER ROLE marked PASSWORD 'another'").execute(database.pool()).await.unwrap();
    broker.rabbitmqctl(&["change_password", "marked", "another"]).await;
    for (binary, arguments) in services() {
        let process = spawn(binary, peers.settings(true), arguments);
        wait_until("the login is refused", async || {
            let is_refusal = |line: &String| {
                line.contains("cannot log in") || line.contains("password authentication failed")
            };
            process.log().iter().any(is_refusal)
        })
        .await;
        assert_all_clean(binary, &process).await;
    }
}

#[tokio::test]
async fn no_secret_leaks_while_all_servers_are_unreachable() {
    let peers = Peers::unreachable();
    let folder = Scratch::new("secrets");
    for (binary, arguments) in services() {
        for in_files in [false, true] {
            let mut settings = peers.settings(true);
            if in_files {
                settings = settings
                    .into_iter()
                    .map(|(name, value)| {
                        let file = folder.path().join(name);
                        std::fs::write(&file, format!("{value}\n")).unwrap();
                        let variable: &'static str = format!("{name}_FILE").leak();
                        (variable, file.display().to_string())
                    })
                    .collect();
            }
            let process = spawn(binary, settings, arguments);
            process.wait_for_log("refused").await;
            if binary == "producer" {
                let address = producer_address(&process).await;
                let refused = http_get(address, "/callback").await.unwrap();
                assert_clean("an error response", &format!("{}{}", refused.head, refused.body));
                let partner = Partner::default();
                partner.post(&callback_endpoint(&process).await, &[1]).await;
                assert_clean("the response to a callback", &partner.ledger().refused.join("\n"));
            }
            assert_all_clean(binary, &process).await;
        }
    }
    for arguments in [&["objects"][..], &["dead-letters", "list"]] {
        let process = spawn("lastseen", peers.settings(true), arguments);
        assert_eq!(process.wait().await.code(), Some(70));
        assert_clean("a command's error", &process.log().join("\n"));
    }
}

#[tokio::test]
async fn no_secret_leaks_in_help_or_in_errors_about_bad_values() {
    let peers = Peers::unreachable();
    for binary in BINARIES {
        let help = spawn(binary, peers.settings(true), &["--help"]);
        assert_eq!(help.wait().await.code(), Some(0));
        assert_clean(&format!("{binary} --help"), &help.log().join("\n"));
        let mistyped = format!("--amqp-url={MARK}");
        let refused = spawn(binary, peers.settings(true), &[&mistyped]);
        assert_eq!(refused.wait().await.code(), Some(78));
        assert_clean(&format!("{binary} with an unknown flag"), &refused.log().join("\n"));
    }
    for (name, value) in BAD {
        let takes = |binary: &&&str| match name {
            "AMQP_URI" => {
                ["producer", "consumer", "routine", "viewer", "lastseen"].contains(*binary)
            }
            "DATABASE_URL" => ["consumer", "routine", "viewer", "lastseen"].contains(*binary),
            _ => ["consumer", "lastseen"].contains(*binary),
        };
        for binary in BINARIES.iter().filter(takes) {
            let settings = BTreeMap::from([(name, peers.fill(value))]);
            let refused = spawn(binary, settings, &[]);
            let code = refused.wait().await.code();
            assert_eq!(code, Some(78), "{binary} takes {name}={value}");
            refused.wait_for_log(name).await;
            assert_clean(&format!("{binary} with a bad {name}"), &refused.log().join("\n"));
        }
    }
}
