//! What traces cost the producer.

use testbed::Collector;

use super::callbacks::{NO_STATUS_API, PATIENT, callbacks_at};
use crate::servers::World;
use crate::table::Row;

pub(crate) async fn measure(world: &World) -> anyhow::Result<Vec<Row>> {
    let collector = Collector::start(|_, _| {}).await;
    let endpoint = collector.endpoint();
    let on = ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str());
    let few = [on, ("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0.01")];
    let mut rows = Vec::new();
    for (traces, variables) in [("no traces", &[][..]), ("1% traced", &few), ("all traced", &[on])]
    {
        let place = world.place(NO_STATUS_API.to_owned()).await;
        let variables = [&PATIENT[..], variables].concat();
        let mut row = callbacks_at(&place, 1, 64, &variables).await?;
        row.what = format!("{}, {traces}", row.what);
        rows.push(row);
    }
    Ok(rows)
}
