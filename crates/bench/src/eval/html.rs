//! The report as one page that needs nothing else.

use super::Error;
use super::plots::{by_budget, by_family};
use super::report::{Report, Row};
use std::fmt::Write as _;

const STYLE: &str = "
:root { color-scheme: light dark; --line: #d0d7de; --dim: #59636e }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } p { max-width: 46rem }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } .dim { color: var(--dim) }
svg { max-width: 100%; height: auto } div.wide { overflow-x: auto }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --dim: #9198a1 } }
";

/// The whole page.
///
/// # Errors
/// The drawing library's.
pub fn page(report: &Report) -> Result<String, Error> {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>cacheclip eval</title>\n<style>{STYLE}</style>\n\
         <h1>Quality of reuse: suite {}</h1>\n",
        escape(&report.suite)
    );
    let n: usize = report.families.iter().map(|it| it.n).sum();
    let _ = writeln!(
        page,
        "<p>{n} tasks, seed {}. Primary {}, auxiliary {} (weights' digests). Accuracy is given as a share of the same \
         model's full prefill on the same tasks, with the paired bootstrap's 95 % interval; the ratio is the realised \
         one. These are figures of the models named by their digests and of no others.</p>",
        report.seed, report.primary, report.aux
    );
    for drawing in [by_budget(report)?, by_family(report)?].into_iter().flatten() {
        let _ = writeln!(page, "<div class=\"wide\">{drawing}</div>");
    }
    families(&mut page, report);
    let mut sections: Vec<&str> = Vec::new();
    for row in report.rows.iter().rev() {
        if !sections.contains(&row.family.as_str()) {
            sections.push(&row.family);
        }
    }
    for family in sections {
        let rows: Vec<Vec<String>> =
            report.rows.iter().filter(|row| row.family == family).map(cells).collect();
        let _ = writeln!(page, "<h2>{}</h2>", escape(family));
        table(
            &mut page,
            &["policy", "asked", "realised", "accuracy", "% of full", "95 %", "KL", "first token", "n"],
            &rows,
        );
    }
    differences(&mut page, report);
    signals(&mut page, report);
    rest(&mut page, report);
    Ok(page)
}

fn cells(row: &Row) -> Vec<String> {
    let percent = |value: Option<f64>| value.map_or_else(|| "–".into(), |value| format!("{value:.1}"));
    vec![
        row.policy.clone(),
        row.ratio.map_or_else(|| "–".into(), |ratio| format!("{:.0} %", 100.0 * ratio)),
        format!("{:.1} %", 100.0 * row.realised_ratio),
        format!("{:.3}", row.accuracy),
        percent(row.pct_of_full),
        format!("{} … {}", percent(row.ci_low), percent(row.ci_high)),
        format!("{:.3}", row.kl),
        format!("{:.3}", row.first_token_agreement),
        row.n.to_string(),
    ]
}

fn families(page: &mut String, report: &Report) {
    let rows: Vec<Vec<String>> = report
        .families
        .iter()
        .map(|it| {
            let pooled = if it.answerable { "yes" } else { "no: full attention fails" };
            vec![
                it.family.clone(),
                if it.cross_chunk { "yes" } else { "" }.into(),
                format!("{:.3}", it.full_accuracy),
                pooled.into(),
                format!("{:.0}", it.tokens),
                it.n.to_string(),
            ]
        })
        .collect();
    page.push_str("<h2>Families under full attention</h2>\n");
    table(page, &["family", "cross-chunk", "accuracy", "pooled", "tokens", "n"], &rows);
}

fn differences(page: &mut String, report: &Report) {
    if report.differences.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Ours less each rival, cross-chunk families pooled, in points of full attention</h2>\n",
    );
    let rows: Vec<Vec<String>> = report
        .differences
        .iter()
        .map(|it| {
            vec![
                format!("{} − {}", it.policy, it.rival),
                format!("{:.0} %", 100.0 * it.ratio),
                format!("{:+.1}", it.points),
                it.interval.map_or_else(String::new, |at| format!("{:+.1} … {:+.1}", at.low, at.high)),
                if it.best_rival { "best rival" } else { "" }.into(),
                it.n.to_string(),
            ]
        })
        .collect();
    table(page, &["difference", "asked", "points", "95 %", "", "n"], &rows);
}

fn signals(page: &mut String, report: &Report) {
    if report.signals.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Signals</h2>\n<p>Recall: decisive candidate tokens among the best 10 and 20 %. Overlap and mass: against what the \
         primary's question looks at under full prefill (mean over heads, tokens and layers); by chance 20 %.</p>\n",
    );
    let rows: Vec<Vec<String>> = report
        .signals
        .iter()
        .map(|it| {
            let shares = [it.recall_10, it.recall_20, it.overlap_20, it.mass_20].map(|it| format!("{it:.2}"));
            [vec![it.signal.clone(), it.family.clone()], shares.to_vec(), vec![it.n.to_string()]].concat()
        })
        .collect();
    table(page, &["signal", "family", "recall 10 %", "recall 20 %", "overlap 20 %", "mass 20 %", "n"], &rows);
}

fn rest(page: &mut String, report: &Report) {
    page.push_str("<h2>The stale cache's relative error</h2>\n");
    let error = |name: &str, [k, v]: [f32; 2]| vec![name.to_owned(), format!("{k:.3}"), format!("{v:.3}")];
    let kv = report.kv_error;
    let rows = [
        error("first chunk", kv.first),
        error("first 8 tokens of later chunks", kv.head),
        error("interior", kv.interior),
    ];
    table(page, &["rows", "K", "V"], &rows);
    page.push_str("<h2>Policies</h2>\n");
    let rows: Vec<Vec<String>> =
        report.policies.iter().map(|(name, about)| vec![name.clone(), about.clone()]).collect();
    table(page, &["policy", ""], &rows);
    page.push_str("<h2>Seconds</h2>\n");
    let rows: Vec<Vec<String>> =
        report.seconds.iter().map(|(stage, seconds)| vec![stage.clone(), format!("{seconds:.1}")]).collect();
    table(page, &["stage (all threads)", "s"], &rows);
    let [primary, aux] = &report.certificates;
    let _ = writeln!(
        page,
        "<p class=\"dim\">Certificates. Primary: {}. Auxiliary: {}.</p>",
        escape(primary),
        escape(aux)
    );
}

fn table(page: &mut String, header: &[&str], rows: &[Vec<String>]) {
    let line = |tag: &str, cells: &mut dyn Iterator<Item = &str>| -> String {
        let cells: String = cells.map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    page.push_str("<div class=\"wide\"><table>\n");
    page.push_str(&line("th", &mut header.iter().copied()));
    for row in rows {
        page.push_str(&line("td", &mut row.iter().map(String::as_str)));
    }
    page.push_str("</table></div>\n");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
