use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdout, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection as _, PgConnection};
use testkit::{Scratch, amqp_uri, connect, database_url, wait_until};

/// `testkit-servers` with a shell script as its command. It uses the shared servers.
fn servers(options: &[&str], script: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_testkit-servers"));
    command.args(options).args(["sh", "-c", script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn lines_of(servers: &mut Child) -> Lines<BufReader<ChildStdout>> {
    BufReader::new(servers.stdout.take().unwrap()).lines()
}

#[test]
fn command_reads_stdin_and_its_exit_code_is_returned() {
    let mut servers = servers(&[], "cat; echo $TEST_AMQP_URI $TEST_DATABASE_URL; exit 7");
    let mut servers = servers.spawn().unwrap();
    servers.stdin.take().unwrap().write_all(b"typed ").unwrap();
    let output = servers.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(7));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed, format!("typed {} {}\n", amqp_uri(), database_url()));
}

#[test]
fn unusable_server_ends_the_start_and_its_password_is_masked() {
    let url = |scheme: &str| format!("{scheme}://nobody:hidden@127.0.0.1:1/x?password=hidden");
    for (variable, url) in [("TEST_AMQP_URI", url("amqp")), ("TEST_DATABASE_URL", url("postgres"))]
    {
        let mut servers = servers(&[], "echo started");
        let output = servers.env(variable, url).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]));
        assert!(errors.contains(variable) && errors.contains("nobody:***@127.0.0.1:1"), "{errors}");
        assert!(!errors.contains("hidden"), "{errors}");
    }
}

#[test]
fn sigterm_reaches_the_command_and_the_script_runs_at_the_end() {
    let script = "trap 'echo stopping; exit 3' TERM; echo ready; read line";
    let mut servers = servers(&["--finally", "echo finally"], script).spawn().unwrap();
    let mut lines = lines_of(&mut servers);
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    kill_process(Pid::from_child(&servers), Signal::TERM).unwrap();
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(rest, ["stopping", "finally"]);
    assert_eq!(servers.wait().unwrap().code(), Some(3));
}

#[tokio::test]
async fn private_servers_end_when_their_process_is_killed() {
    let folder = Scratch::new("servers");
    let mut servers = servers(&[], "echo $TEST_AMQP_URI; echo $TEST_DATABASE_URL; cat");
    for variable in ["TEST_AMQP_URI", "TEST_DATABASE_URL"] {
        servers.env_remove(variable);
    }
    let mut servers = servers.env("TMPDIR", folder.path()).spawn().unwrap();
    let mut lines = lines_of(&mut servers);
    let mut next = || lines.next().unwrap().unwrap();
    let (amqp_uri, database_url) = (next(), next());
    drop(connect(&amqp_uri).await.unwrap());
    let mut connection = PgConnection::connect(&database_url).await.unwrap();
    let sql = "SELECT current_setting('max_connections')";
    let limit: String = sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap();
    assert_eq!(limit, "300");

    servers.kill().unwrap();
    servers.wait().unwrap();
    wait_until("their files are removed", async || {
        folder.path().read_dir().unwrap().next().is_none()
    })
    .await;
    assert!(connect(&amqp_uri).await.is_err());
    assert!(PgConnection::connect(&database_url).await.is_err());
}
