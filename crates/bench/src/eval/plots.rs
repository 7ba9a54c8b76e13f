//! The report's drawings.

use super::Error;
use super::policies::{OURS, catalogue};
use super::report::{CROSS, Report, Row};
use crate::plot::{Chart, Scale, Series};
use plotters::prelude::*;

/// Curves that fit a drawing.
const CURVES: usize = 6;

/// Share of full attention by realised ratio, pooled over cross-chunk families: ours and the best rivals. None where
/// no policy has two points.
///
/// # Errors
/// The drawing library's.
pub fn by_budget(report: &Report) -> Result<Option<String>, Error> {
    let informed: Vec<String> = names(|policy| policy.informed() || policy.ablation());
    let pooled = || report.rows.iter().filter(|row| row.family == CROSS && row.ratio.is_some());
    let mut curves: Vec<(f64, Series)> = Vec::new();
    for row in pooled().filter(|row| !informed.contains(&row.policy)) {
        let Some(percent) = row.pct_of_full else { continue };
        let point = (100.0 * row.realised_ratio, percent);
        match curves.iter_mut().find(|(_, series)| series.name == row.policy) {
            Some((sum, series)) => {
                *sum += percent;
                series.dots.push(point);
            }
            None => {
                curves.push((
                    percent,
                    Series { name: row.policy.clone(), dots: vec![point], line: Vec::new() },
                ));
            }
        }
    }
    curves.sort_by(|a, b| (b.1.name == OURS).cmp(&(a.1.name == OURS)).then(b.0.total_cmp(&a.0)));
    curves.truncate(CURVES);
    let mut series: Vec<Series> = curves.into_iter().map(|(_, series)| series).collect();
    for series in &mut series {
        series.dots.sort_by(|a, b| a.0.total_cmp(&b.0));
        series.line.clone_from(&series.dots);
    }
    if series.iter().all(|series| series.dots.len() < 2) {
        return Ok(None);
    }
    let chart = Chart {
        title: "Cross-chunk families: accuracy by recomputed share".into(),
        x: "recomputed reused tokens, %".into(),
        y: "accuracy, % of full prefill".into(),
        scale: Scale::Linear,
        series,
    };
    chart.svg().map(Some).map_err(|error| Error::Settings(error.to_string()))
}

/// Names of the policies that `wanted` takes.
fn names(wanted: impl Fn(&dyn super::policies::Policy) -> bool) -> Vec<String> {
    catalogue(&[]).iter().filter(|policy| wanted(&***policy)).map(|policy| policy.name().to_owned()).collect()
}

/// Every family at the largest ratio: share of full attention with its interval, for stale reuse, the best rival and
/// ours. None where no family has such rows.
///
/// # Errors
/// The drawing library's.
pub fn by_family(report: &Report) -> Result<Option<String>, Error> {
    let Some(ratio) = report.ratios.iter().copied().reduce(f32::max) else { return Ok(None) };
    let best =
        report.differences.iter().find(|it| it.best_rival && it.ratio == ratio).map(|it| it.rival.as_str());
    let shown: Vec<&str> = ["stale"].into_iter().chain(best).chain([OURS]).collect();
    let families: Vec<&str> = report.families.iter().map(|it| it.family.as_str()).collect();
    let of = |policy: &str, family: &str| -> Option<&Row> {
        report.row(family, policy, Some(ratio)).or_else(|| report.row(family, policy, None))
    };
    let rows = |policy: &'_ str| -> Vec<(usize, &Row)> {
        families.iter().enumerate().filter_map(|(at, family)| Some((at, of(policy, family)?))).collect()
    };
    if shown.iter().all(|policy| rows(policy).is_empty()) {
        return Ok(None);
    }
    let mut svg = String::new();
    draw(&mut svg, &families, &shown, &rows, ratio)
        .map_err(|error| Error::Settings(format!("drawing: {error}")))?;
    Ok(Some(svg))
}

fn draw<'a>(
    svg: &mut String,
    families: &[&str],
    shown: &[&str],
    rows: &dyn Fn(&str) -> Vec<(usize, &'a Row)>,
    ratio: f32,
) -> Result<(), Box<dyn std::error::Error>> {
    const COLOURS: [RGBColor; 3] = [RGBColor(120, 120, 120), RGBColor(213, 94, 0), RGBColor(0, 114, 178)];
    let height = 90 + 34 * families.len() as u32;
    let root = SVGBackend::with_string(svg, (760, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("Accuracy by family, {:.0} % recomputed (95 % intervals)", 100.0 * ratio);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(150)
        .build_cartesian_2d(0.0..125.0, 0.0..families.len() as f64)?;
    let label = |y: &f64| {
        let at = families.len() as f64 - 0.5 - y;
        let near = at.round().max(0.0) as usize;
        if (at - near as f64).abs() < 1e-6 {
            families.get(near).copied().unwrap_or_default().to_owned()
        } else {
            String::new()
        }
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc("% of full prefill")
        .x_labels(6)
        .y_labels(2 * families.len() + 1)
        .y_label_formatter(&label)
        .draw()?;
    for (place, policy) in shown.iter().enumerate() {
        let colour = COLOURS[place * (COLOURS.len() - 1) / (shown.len() - 1).max(1)];
        let points = rows(policy);
        let y = |at: usize| families.len() as f64 - 0.5 - at as f64 + 0.22 * (1.0 - place as f64);
        chart.draw_series(points.iter().filter_map(|(at, row)| {
            let bounds = vec![(row.ci_low?, y(*at)), (row.ci_high?, y(*at))];
            Some(PathElement::new(bounds, colour.stroke_width(2)))
        }))?;
        let dots = points
            .iter()
            .filter_map(|(at, row)| Some(Circle::new((row.pct_of_full?, y(*at)), 4, colour.filled())));
        chart
            .draw_series(dots)?
            .label(*policy)
            .legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    root.present()?;
    drop(chart);
    Ok(())
}
