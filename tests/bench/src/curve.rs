//! Draws the accepted load and its latency against the offered load.

use std::path::Path;

use anyhow::Context as _;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

/// The result of one offered load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Point {
    pub(crate) has_spool: bool,
    /// Relative to the rate that the broker confirms, like `accepted`.
    pub(crate) offered: f64,
    pub(crate) accepted: f64,
    /// Latency of accepted callbacks.
    pub(crate) p99_ms: f64,
}

const SIZE: (u32, u32) = (860, 360);
/// The lines with and without a spool, which also differ in lightness.
const COLOURS: [(bool, RGBColor, &str); 2] =
    [(true, RGBColor(0, 90, 181), "with a spool"), (false, RGBColor(220, 150, 30), "without")];

type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Draws the points in two charts side by side, as SVG.
pub(crate) fn draw(path: &Path, points: &[Point]) -> anyhow::Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    let accepted: fn(&Point) -> f64 = |point| point.accepted;
    let p99: fn(&Point) -> f64 = |point| point.p99_ms;
    let charts = [
        (left, "accepted, relative to the broker's capacity", 3.2, accepted),
        (right, "p99 latency of accepted callbacks, ms", 1_000.0, p99),
    ];
    for (area, title, top, value) in charts {
        let mut chart: Chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 15))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..3.2, 0.0..top)?;
        chart
            .configure_mesh()
            .x_desc("offered, relative to the broker's capacity")
            .light_line_style(WHITE)
            .draw()?;
        for (has_spool, colour, name) in COLOURS {
            let selected = points.iter().filter(|point| point.has_spool == has_spool);
            let line: Vec<(f64, f64)> =
                selected.map(|point| (point.offered, value(point))).collect();
            let legend =
                move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2));
            chart
                .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)).point_size(3))?
                .label(name)
                .legend(legend);
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE)
            .draw()?;
    }
    area.present().with_context(|| format!("cannot write {}", path.display()))
}
