//! Curves and bars as SVG: text stays text, so no font is needed to draw it, and one file reads well on light and dark pages.

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

const SIZE: (u32, u32) = (760, 460);
/// Told apart by the colour-blind, and against white as well as black.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
/// What is drawn for light pages is redrawn for dark ones by the reader's own preference.
const DARK: &str = r##"<style>@media (prefers-color-scheme: dark) {
[fill="#FFFFFF"] { fill: #0d1117 } [fill="#000000"] { fill: #e6edf3 } [stroke="#000000"] { stroke: #e6edf3 }
}</style>
"##;

/// What every chart stands in.
fn frame<'a, 'b>(
    area: &'a DrawingArea<SVGBackend<'b>, Shift>,
    title: &str,
) -> Result<ChartBuilder<'a, 'a, SVGBackend<'b>>, Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let mut frame = ChartBuilder::on(area);
    frame.caption(title, ("sans-serif", 20)).margin(12).x_label_area_size(44).y_label_area_size(64);
    Ok(frame)
}

/// Why a chart was not drawn.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing can be drawn; on a logarithmic scale only positive points can.
    #[error("{title:?} has no points")]
    Empty {
        /// The chart's title.
        title: String,
    },
    /// The drawing library failed.
    #[error("drawing: {0}")]
    Draw(String),
}

/// What is drawn in one colour, under one name in the legend; x ascends.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// What it is.
    pub name: String,
    /// Points on their own: what was measured.
    pub dots: Vec<(f64, f64)>,
    /// Points joined by a line: what was made of it.
    pub line: Vec<(f64, f64)>,
}

/// How the axes are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Both linear; y begins at 0.
    Linear,
    /// Both logarithmic: x by twos, y by tens.
    Logarithmic,
}

/// One drawing.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// What x is, with its unit.
    pub x: String,
    /// What y is, with its unit.
    pub y: String,
    /// Of both axes.
    pub scale: Scale,
    /// What is drawn.
    pub series: Vec<Series>,
}

impl Chart {
    /// The drawing as the text of an SVG file.
    ///
    /// # Errors
    /// No points, or a failure of the drawing library.
    pub fn svg(&self) -> Result<String, Error> {
        let (x, y) = self.extent().ok_or_else(|| Error::Empty { title: self.title.clone() })?;
        let mut svg = String::new();
        match self.scale {
            Scale::Linear => self.draw(&mut svg, x, 0.0..y.end * 1.1),
            Scale::Logarithmic => {
                let (x, y) = (x.start / 1.1..x.end * 1.1, y.start / 1.5..y.end * 1.5);
                self.draw(&mut svg, x.log_scale().base(2.0), y.log_scale())
            }
        }
        .map_err(|error| Error::Draw(error.to_string()))?;
        Ok(with_dark_form(svg))
    }

    fn drawable(&self, (x, y): (f64, f64)) -> bool {
        let fits = |value: f64| value.is_finite() && (self.scale == Scale::Linear || value > 0.0);
        fits(x) && fits(y)
    }

    fn drawables<'a>(&'a self, points: &'a [(f64, f64)]) -> impl Iterator<Item = (f64, f64)> + 'a {
        points.iter().copied().filter(|&point| self.drawable(point))
    }

    /// Least and greatest x and y.
    fn extent(&self) -> Option<(Range<f64>, Range<f64>)> {
        let points = self.series.iter().flat_map(|series| [&series.dots, &series.line]);
        let points = points.flat_map(|points| self.drawables(points));
        let grown = points.fold(None, |extent: Option<(Range<f64>, Range<f64>)>, (px, py)| {
            let (x, y) = extent.unwrap_or((px..px, py..py));
            Some((x.start.min(px)..x.end.max(px), y.start.min(py)..y.end.max(py)))
        });
        // A single x still needs a width.
        grown.map(|(x, y)| if x.start < x.end { (x, y) } else { (x.start - 0.5..x.end + 0.5, y) })
    }

    fn draw<X, Y>(&self, svg: &mut String, x: X, y: Y) -> Result<(), Box<dyn std::error::Error>>
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64> + Ranged<ValueType = f64>,
        Y::CoordDescType: ValueFormatter<f64> + Ranged<ValueType = f64>,
    {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let mut chart = frame(&area, &self.title)?.build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.15))
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| short(*value))
            .label_style(("sans-serif", 16))
            .draw()?;
        for (series, &colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            chart.draw_series(LineSeries::new(self.drawables(&series.line), colour.stroke_width(2)))?;
            let dots = self.drawables(&series.dots).map(|point| Circle::new(point, 3, colour.filled()));
            let drawn = chart.draw_series(dots)?.label(&series.name);
            drawn.legend(move |(x, y)| Rectangle::new([(x, y - 2), (x + 16, y + 2)], colour.filled()));
        }
        chart
            .configure_series_labels()
            .position(match self.scale {
                // Where the curves are not: they rise, or stand above zero.
                Scale::Logarithmic => SeriesLabelPosition::UpperLeft,
                Scale::Linear => SeriesLabelPosition::LowerRight,
            })
            .background_style(WHITE)
            .label_font(("sans-serif", 16))
            .draw()?;
        area.present()?;
        Ok(())
    }
}

fn with_dark_form(mut svg: String) -> String {
    // Behind the opening tag, which ends the first line that begins with it.
    let body = svg.find("<svg").and_then(|at| svg[at..].find('>').map(|end| at + end + 1));
    svg.insert_str(body.unwrap_or(0), DARK);
    svg
}

/// Bars in groups: the same things compared at several sizes. A value that is no number has no bar.
#[derive(Clone, Debug)]
pub struct Bars {
    /// Above it.
    pub title: String,
    /// What is compared, with its unit.
    pub y: String,
    /// Names of what is compared: one bar of each in a group, each with its colour.
    pub series: Vec<String>,
    /// Name and values of each group; a value per series.
    pub groups: Vec<(String, Vec<f64>)>,
}

impl Bars {
    /// The drawing as the text of an SVG file.
    ///
    /// # Errors
    /// No bars, or a failure of the drawing library.
    pub fn svg(&self) -> Result<String, Error> {
        let values = self.groups.iter().flat_map(|(_, values)| values).copied();
        let most = values.filter(|value| value.is_finite()).fold(0.0, f64::max);
        if most <= 0.0 {
            return Err(Error::Empty { title: self.title.clone() });
        }
        let mut svg = String::new();
        // Above the tallest there is room for the legend.
        self.draw(&mut svg, most * 1.5).map_err(|error| Error::Draw(error.to_string()))?;
        Ok(with_dark_form(svg))
    }

    fn draw(&self, svg: &mut String, top: f64) -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let mut chart =
            frame(&area, &self.title)?.build_cartesian_2d(0.0..self.groups.len() as f64, 0.0..top)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.15))
            .y_desc(&self.y)
            .y_label_formatter(&|value| short(*value))
            .label_style(("sans-serif", 16))
            .draw()?;
        // Bars of a group fill four fifths of its place.
        let width = 0.8 / self.series.len().max(1) as f64;
        for (place, (name, &colour)) in self.series.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let bars = self.groups.iter().enumerate().filter_map(|(group, (_, values))| {
                let value = values.get(place).copied().filter(|value| value.is_finite())?;
                let left = group as f64 + 0.1 + place as f64 * width;
                Some(Rectangle::new([(left, 0.0), (left + width * 0.9, value)], colour.filled()))
            });
            let drawn = chart.draw_series(bars)?.label(name);
            drawn.legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 16, y + 4)], colour.filled()));
        }
        let below = ("sans-serif", 16).into_text_style(&area).pos(Pos::new(HPos::Center, VPos::Top));
        chart.draw_series(
            self.groups
                .iter()
                .enumerate()
                .map(|(group, (name, _))| Text::new(name.clone(), (group as f64 + 0.5, 0.0), below.clone())),
        )?;
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .label_font(("sans-serif", 16))
            .draw()?;
        area.present()?;
        Ok(())
    }
}

/// A tick's label: thousands and millions short, no more digits than there are.
fn short(value: f64) -> String {
    let magnitude = value.abs();
    let (scaled, unit) = match magnitude {
        m if m >= 1e6 => (value / 1e6, "M"),
        // Lengths double: 32768 is 32K.
        m if m >= 1024.0 && m % 1024.0 == 0.0 => (value / 1024.0, "K"),
        m if m >= 1e3 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = format!("{scaled:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{}{unit}", if text.is_empty() { "0" } else { text })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(scale: Scale, points: Vec<(f64, f64)>) -> Chart {
        let series = Series { name: "full <prefill>".into(), dots: points.clone(), line: points };
        Chart {
            title: "Cost".into(),
            x: "tokens".into(),
            y: "milliseconds".into(),
            scale,
            series: vec![series],
        }
    }

    #[test]
    fn a_drawing_has_its_names_its_units_a_dot_per_point_and_a_dark_form() {
        let points = vec![(1024.0, 100.0), (2048.0, 230.0), (4096.0, 600.0), (8192.0, 0.0)];
        let svg = chart(Scale::Logarithmic, points.clone()).svg().expect("a drawing");
        for text in ["Cost", "tokens", "milliseconds", "full &lt;prefill&gt;", "prefers-color-scheme", "2K"] {
            assert!(svg.contains(text), "no {text} in {svg}");
        }
        // Zero has no place on a logarithmic scale; on a linear one it has.
        assert_eq!(svg.matches("<circle").count(), 3);
        let svg = chart(Scale::Linear, points).svg().expect("a drawing");
        assert_eq!(svg.matches("<circle").count(), 4);
    }

    #[test]
    fn nothing_to_draw_is_said_and_a_single_point_is_drawn() {
        assert!(matches!(chart(Scale::Linear, Vec::new()).svg(), Err(Error::Empty { .. })));
        assert!(matches!(chart(Scale::Logarithmic, vec![(1.0, 0.0)]).svg(), Err(Error::Empty { .. })));
        let svg = chart(Scale::Linear, vec![(5.0, 1.0)]).svg().expect("a drawing");
        assert_eq!(svg.matches("<circle").count(), 1);
    }

    #[test]
    fn every_group_has_a_bar_of_each_that_was_measured() {
        let bars = |values: Vec<f64>| Bars {
            title: "Rates".into(),
            y: "GB/s".into(),
            series: vec!["ours".into(), "theirs".into()],
            groups: vec![("4 MiB".into(), values.clone()), ("32 MiB".into(), values)],
        };
        let svg = bars(vec![1.0, 2.0]).svg().expect("a drawing");
        for text in ["Rates", "GB/s", "ours", "theirs", "4 MiB", "32 MiB", "prefers-color-scheme"] {
            assert!(svg.contains(text), "no {text} in {svg}");
        }
        let filled = |svg: &str| svg.matches("<rect").count();
        let one_skipped = bars(vec![1.0, f64::NAN]).svg().expect("a drawing");
        assert_eq!(filled(&svg) - filled(&one_skipped), 2, "a bar per group");
        assert!(matches!(bars(vec![f64::NAN]).svg(), Err(Error::Empty { .. })));
    }

    #[test]
    fn ticks_are_short() {
        let cases =
            [(0.0, "0"), (0.25, "0.25"), (100.0, "100"), (16384.0, "16K"), (1500.0, "1.5k"), (2e6, "2M")];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }
}
