//! The network policies allow exactly the connections that are needed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Value, json};

use super::manifests::{Build, Workload, builds, list, of_kind, selects, text};

/// A pod, or an address outside of the cluster.
struct Peer {
    name: String,
    /// The labels of its namespace.
    namespace: Value,
    labels: Value,
    /// Its named ports.
    ports: BTreeMap<&'static str, u64>,
    /// An address, if it is not a pod.
    address: Option<IpAddr>,
}

impl Peer {
    fn pod(name: &str, namespace: Value, labels: Value) -> Self {
        Self { name: name.to_owned(), namespace, labels, ports: BTreeMap::new(), address: None }
    }

    fn of(workload: &Workload) -> Self {
        let pod = Self::pod(workload.name(), lastseen(), workload.labels().clone());
        Self { ports: workload.ports(), ..pod }
    }

    fn address(name: &str, address: &str) -> Self {
        let peer = Self::pod(name, json!({}), json!({}));
        Self { address: Some(address.parse().unwrap()), ..peer }
    }

    fn is_in_policies_namespace(&self) -> bool {
        self.address.is_none() && self.namespace == lastseen()
    }
}

fn lastseen() -> Value {
    json!({"kubernetes.io/metadata.name": "lastseen"})
}

/// The peers of the services of one build.
fn peers(build: &'static Build) -> Vec<Peer> {
    let mut peers: Vec<Peer> = build.workloads().iter().map(Peer::of).collect();
    let namespace = |label: &str, value: &str| json!({ label: value });
    let by_name = |name: &str| namespace("kubernetes.io/metadata.name", name);
    peers.extend([
        Peer::pod("gateway", namespace("lastseen-gateway", "true"), json!({})),
        Peer::pod("monitoring", namespace("lastseen-monitoring", "true"), json!({})),
        Peer::pod("another application", by_name("shop"), json!({"app": "shop"})),
        Peer::pod("another pod", lastseen(), json!({"app": "shop"})),
        Peer::pod("name server", by_name("kube-system"), json!({"k8s-app": "kube-dns"})),
        Peer::address("internet", "203.0.113.7"),
        Peer::address("internet (IPv6)", "2001:db8::7"),
        Peer::address("metadata of the cloud", "169.254.169.254"),
        Peer::address("metadata of AWS (IPv6)", "fd00:ec2::254"),
        Peer::address("metadata of Google Cloud (IPv6)", "fd20:ce::254"),
    ]);
    if build.servers == "operators" {
        let operator = json!({"app.kubernetes.io/name": "cloudnative-pg"});
        peers.extend([
            Peer::pod(
                "rabbitmq",
                lastseen(),
                json!({"app.kubernetes.io/name": "lastseen-rabbitmq"}),
            ),
            Peer::pod("postgres", lastseen(), json!({"cnpg.io/cluster": "lastseen-postgres"})),
            Peer::pod("operator of postgres", by_name("cnpg-system"), operator),
        ]);
    }
    peers
}

#[derive(Clone, Copy)]
struct Direction {
    policy_type: &'static str,
    rules: &'static str,
    peers: &'static str,
}

const INGRESS: Direction = Direction { policy_type: "Ingress", rules: "ingress", peers: "from" };
const EGRESS: Direction = Direction { policy_type: "Egress", rules: "egress", peers: "to" };

/// Whether the policies of `of` allow a connection between `of` and `other` in this direction, to
/// `port` of `server`.
fn allows(
    policies: &[&Value],
    direction: Direction,
    [of, other, server]: [&Peer; 3],
    port: u64,
) -> bool {
    let is_typed = |policy: &&&Value| {
        list(&policy["spec"]["policyTypes"]).contains(&direction.policy_type.into())
    };
    let applies = |policy: &&&Value| {
        of.is_in_policies_namespace() && selects(&policy["spec"]["podSelector"], &of.labels)
    };
    let mut policies = policies.iter().filter(is_typed).filter(applies).peekable();
    // A pod that no policy selects may do anything.
    policies.peek().is_none()
        || policies.flat_map(|policy| list(&policy["spec"][direction.rules])).any(|rule| {
            let is_port = |allowed: &Value| match allowed["port"].as_u64() {
                Some(first) => {
                    (first..=allowed["endPort"].as_u64().unwrap_or(first)).contains(&port)
                }
                None => server.ports.get(text(&allowed["port"])) == Some(&port),
            };
            list(&rule["ports"]).iter().any(is_port)
                && list(&rule[direction.peers]).iter().any(|peer| is_peer(peer, other))
        })
}

fn is_peer(selector: &Value, peer: &Peer) -> bool {
    if let Some(block) = selector.get("ipBlock") {
        // Blocks are for addresses outside of the cluster.
        let is_in = |cidr: &Value, address| contains(text(cidr), address);
        return peer.address.is_some_and(|address| {
            is_in(&block["cidr"], address)
                && !list(&block["except"]).iter().any(|cidr| is_in(cidr, address))
        });
    }
    let is_namespace = match selector.get("namespaceSelector") {
        Some(namespaces) => selects(namespaces, &peer.namespace),
        None => peer.is_in_policies_namespace(),
    };
    let is_pod = selector.get("podSelector").is_none_or(|pods| selects(pods, &peer.labels));
    peer.address.is_none() && is_namespace && is_pod
}

fn contains(cidr: &str, address: IpAddr) -> bool {
    let (network, bits) = cidr.split_once('/').unwrap();
    let bits: u32 = bits.parse().unwrap();
    match (network.parse().unwrap(), address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            (network.to_bits() ^ address.to_bits()).leading_zeros() >= bits
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            (network.to_bits() ^ address.to_bits()).leading_zeros() >= bits
        }
        _ => false,
    }
}

/// All connections from and to pods that have policies: client, server and port.
fn allowed(build: &'static Build) -> BTreeSet<String> {
    let policies: Vec<&Value> = of_kind(&build.items, "NetworkPolicy").collect();
    let peers = peers(build);
    let mut ports: BTreeSet<u64> = [22, 53, 80, 443, 4369, 5432, 5671, 5672, 8000, 9187].into();
    ports.extend([15672, 15692, 25672, 35680]);
    ports.extend(peers.iter().flat_map(|peer| peer.ports.values()));
    let is_isolated = |peer: &Peer, direction| {
        !allows(&policies, direction, [peer, &Peer::pod("", json!({}), json!({})), peer], 0)
    };
    let mut allowed = BTreeSet::new();
    for client in &peers {
        for server in &peers {
            if !is_isolated(client, EGRESS) && !is_isolated(server, INGRESS) {
                continue;
            }
            for &port in &ports {
                if allows(&policies, EGRESS, [client, server, server], port)
                    && allows(&policies, INGRESS, [server, client, server], port)
                {
                    allowed.insert(format!("{} -> {}:{port}", client.name, server.name));
                }
            }
        }
    }
    allowed
}

/// What the policies of a build allow depends only on these.
fn inputs(build: &'static Build) -> String {
    let policies: Vec<&Value> = of_kind(&build.items, "NetworkPolicy").collect();
    let pods = build.workloads();
    let pods: Vec<_> = pods.iter().map(|pod| (pod.name(), pod.labels(), pod.ports())).collect();
    format!("{policies:?} {pods:?} {:?} {:?}", clients(build), build.servers)
}

/// The workloads that connect to the broker, and those that connect to the database.
fn clients(build: &'static Build) -> [Vec<&'static str>; 2] {
    let with = |settings: &[&str]| {
        let pods = build.workloads().into_iter();
        let pods =
            pods.filter(|pod| settings.iter().any(|name| pod.own_variables().contains_key(name)));
        pods.map(|pod| pod.name()).collect()
    };
    [with(&["AMQP_URI_FILE"]), with(&["DATABASE_URL_FILE", "POSTGRES_HOST"])]
}

/// The connections that the pods of a build need.
fn needed(build: &'static Build) -> BTreeSet<String> {
    let pods = build.workloads();
    let names: Vec<&str> = pods.iter().map(Workload::name).collect();
    let mut needed = BTreeSet::new();
    let mut expect = |clients: &[&str], server: &str| {
        for client in clients {
            needed.insert(format!("{client} -> {server}"));
        }
    };
    expect(&names, "name server:53");
    expect(&["gateway"], "producer:9090");
    expect(&["gateway"], "viewer:9080");
    expect(&["consumer"], "internet:443");
    expect(&["consumer"], "internet (IPv6):443");
    for pod in &pods {
        if let Some(port) = pod.ports().get("admin") {
            let is_viewer = pod.name() == "viewer";
            let clients: &[&str] = if is_viewer { &[] } else { &["viewer"] };
            expect(clients, &format!("{}:{port}", pod.name()));
            expect(&["monitoring"], &format!("{}:{port}", pod.name()));
        }
    }
    let [of_broker, of_database] = clients(build);
    if build.servers == "operators" {
        expect(&of_broker, "rabbitmq:5672");
        expect(&["rabbitmq"], "rabbitmq:4369");
        expect(&["rabbitmq"], "rabbitmq:25672");
        expect(&["rabbitmq"], "rabbitmq:35680");
        expect(&["monitoring"], "rabbitmq:15692");
        expect(&of_database, "postgres:5432");
        expect(&["postgres", "operator of postgres"], "postgres:5432");
        expect(&["postgres", "operator of postgres"], "postgres:8000");
        expect(&["monitoring"], "postgres:9187");
    } else {
        for internet in ["internet", "internet (IPv6)"] {
            expect(&of_broker, &format!("{internet}:5671"));
            expect(&of_database, &format!("{internet}:5432"));
        }
    }
    needed
}

#[test]
fn network_policies_allow_exactly_the_needed_connections() {
    let mut seen = BTreeSet::new();
    for build in builds().iter().filter(|build| seen.insert(inputs(build))) {
        let [of_broker, of_database] = clients(build);
        assert!(of_broker.len() == 4 && of_database.len() >= 3, "{}", build.name);
        assert_eq!(allowed(build), needed(build), "{}", build.name);
    }
}
