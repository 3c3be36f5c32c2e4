//! The differences between the world of one case and the usual one.

use testkit::RabbitNode;

use crate::load::Rate;

/// The configuration of a world. The variables in it are set in addition to those that each service
/// always gets.
#[derive(Default)]
pub(crate) struct Setup {
    pub(crate) rate: Rate,
    /// Whether the services reach broker and database through `World::to_broker` and
    /// `World::to_database`, which can be silenced or cut.
    pub(crate) has_proxies: bool,
    pub(crate) brokers: Brokers,
    /// Maximum number of connections of the load; `None` for as many as it needs.
    pub(crate) connections: Option<u32>,
    /// Whether the services can write only to the producer's spool.
    pub(crate) read_only_root: bool,
    pub(crate) database: DatabaseSetup,
    /// The number of consumers beyond the first one.
    pub(crate) more_consumers: usize,
    /// The number of producers beyond the first one. If there are any, the load goes to an
    /// `HAProxy` in front of all producers.
    pub(crate) more_producers: usize,
    /// The wrapper with which the producer is started; see [`testkit::Process::spawn_wrapped`].
    pub(crate) producer_wrapper: &'static [&'static str],
    /// Variables of the producer. The next two fields have those of the consumers and the routine.
    pub(crate) producer: Vec<(&'static str, &'static str)>,
    pub(crate) consumer: Vec<(&'static str, &'static str)>,
    pub(crate) routine: Vec<(&'static str, &'static str)>,
}

/// The Postgres cluster of a world.
#[derive(Default, PartialEq, Eq)]
pub(crate) enum DatabaseSetup {
    #[default]
    Single,
    /// The table is on a small disk; see [`testkit::PostgresCluster::fill_small_disk`].
    OnSmallDisk,
    /// There is a synchronous standby, `World::standby`, which the services also know.
    WithStandby,
}

/// The nodes of the broker, and how the services reach them.
#[derive(Clone, Copy, Default)]
pub(crate) enum Brokers {
    /// One node.
    #[default]
    Single,
    /// A cluster of three nodes: `World::broker`, which has the first leader of each queue that is
    /// not a shard, and `World::other_nodes`. `AMQP_URI` lists all three.
    Cluster,
    /// The same cluster, but `AMQP_URI` names only the node with this index.
    ClusterNode(usize),
}

impl Brokers {
    /// The value of `AMQP_URI`.
    pub(crate) fn amqp_uri(self, first: &RabbitNode, others: &[RabbitNode]) -> String {
        let nodes: Vec<&RabbitNode> = std::iter::once(first).chain(others).collect();
        match self {
            Self::Single | Self::Cluster => {
                let addresses: Vec<String> =
                    nodes.iter().map(|node| format!("127.0.0.1:{}", node.amqp_port())).collect();
                format!("amqp://guest:guest@{}/%2f", addresses.join(","))
            }
            Self::ClusterNode(index) => nodes[index].amqp_uri(),
        }
    }
}
