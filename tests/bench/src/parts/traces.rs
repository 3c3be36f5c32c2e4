//! The cost of traces in the producer.

use testkit::Collector;

use super::callbacks::{LONG_TIMEOUT, NO_STATUS_API, callbacks_at};
use crate::servers::Servers;
use crate::table::Row;

pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let collector = Collector::start(|_, _| {}).await;
    let endpoint = collector.endpoint();
    let on = ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str());
    let few = [on, ("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0.01")];
    let mut rows = Vec::new();
    for (traces, variables) in [("no traces", &[][..]), ("1% traced", &few), ("all traced", &[on])]
    {
        let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
        let variables = [&LONG_TIMEOUT[..], variables].concat();
        let mut row = callbacks_at(&deployment, 1, 64, &variables).await?;
        row.what = format!("{}, {traces}", row.what);
        rows.push(row);
    }
    Ok(rows)
}
