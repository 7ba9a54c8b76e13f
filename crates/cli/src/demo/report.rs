//! What the demo found, as data and as text.

use crate::text;
use cacheclip_bench::{Corpus, Family};
use serde::Serialize;

/// Answers reuse must keep, of 24.
const MUST_KEEP: usize = 22;
/// Largest realised ratio at which they count.
const LARGEST_RATIO: f32 = 0.25;
/// Answers stale reuse must lose: otherwise there was nothing to repair.
const STALE_MUST_LOSE: usize = 4;

/// Everything `--json` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) seed: Option<u64>,
    pub(crate) questions: Vec<QuestionReport>,
    pub(crate) timing_row: Option<TimingRow>,
    pub(crate) summary: Summary,
}

/// One question, answered four ways.
#[derive(Debug, Serialize)]
pub(crate) struct QuestionReport {
    pub(crate) family: Family,
    pub(crate) question: String,
    pub(crate) expected: String,
    pub(crate) answer: String,
    pub(crate) cold_answer: String,
    pub(crate) full_answer: String,
    pub(crate) stale_answer: String,
    pub(crate) rung: String,
    pub(crate) realised_ratio: f32,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) ttft_ms: Ttft,
}

/// One chunk of the warm request.
#[derive(Debug, Serialize)]
pub(crate) struct Chunk {
    pub(crate) document: usize,
    pub(crate) tokens: u32,
    pub(crate) hit: bool,
    pub(crate) tier: String,
    pub(crate) reason: Option<String>,
    pub(crate) recomputed: u32,
    pub(crate) recomputed_bytes: Vec<(u32, u32)>,
}

/// Milliseconds from sending a request to its first token.
#[derive(Debug, Serialize)]
pub(crate) struct Ttft {
    pub(crate) cold: f64,
    pub(crate) full: f64,
    pub(crate) reuse: f64,
}

/// The larger shape.
#[derive(Debug, Serialize)]
pub(crate) struct TimingRow {
    pub(crate) shape: String,
    pub(crate) prompt_tokens: u32,
    pub(crate) chunks: usize,
    pub(crate) rounds: usize,
    pub(crate) realised_ratio: f32,
    pub(crate) cold_ms: f64,
    pub(crate) full_ms: f64,
    pub(crate) reuse_ms: f64,
    pub(crate) speedup: f64,
    pub(crate) stages: Vec<Stage>,
}

/// Time in one stage of the median reuse request.
#[derive(Debug, Serialize)]
pub(crate) struct Stage {
    pub(crate) name: String,
    pub(crate) ms: f64,
}

/// The verdict.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) questions: usize,
    /// Answers where reuse says what full prefill says.
    pub(crate) kept: usize,
    /// Of those, at a realised ratio of at most 0.25.
    pub(crate) kept_within_ratio: usize,
    /// Answers where stale reuse says something else than full prefill.
    pub(crate) stale_lost: usize,
    /// Answers where full prefill is right.
    pub(crate) full_right: usize,
    /// Answers where hits and misses differ (must be none).
    pub(crate) cold_differs: usize,
    pub(crate) largest_realised_ratio: f32,
    pub(crate) chunks: usize,
    pub(crate) chunks_hit: usize,
    pub(crate) passed: bool,
    pub(crate) sentence: String,
}

impl Summary {
    pub(crate) fn judge(questions: &[QuestionReport], timing: Option<&TimingRow>) -> Self {
        let count = |test: &dyn Fn(&QuestionReport) -> bool| questions.iter().filter(|q| test(q)).count();
        let kept = count(&|q| q.answer == q.full_answer);
        let kept_within_ratio = count(&|q| q.answer == q.full_answer && q.realised_ratio <= LARGEST_RATIO);
        let stale_lost = count(&|q| q.stale_answer != q.full_answer);
        let enough = MUST_KEEP * questions.len();
        let keeps = kept_within_ratio * super::QUESTIONS >= enough && !questions.is_empty();
        let proves = stale_lost >= STALE_MUST_LOSE;
        let mut summary = Self {
            questions: questions.len(),
            kept,
            kept_within_ratio,
            stale_lost,
            full_right: count(&|q| q.full_answer == q.expected),
            cold_differs: count(&|q| q.cold_answer != q.answer),
            largest_realised_ratio: questions.iter().map(|q| q.realised_ratio).fold(0.0, f32::max),
            chunks: questions.iter().map(|q| q.chunks.len()).sum(),
            chunks_hit: questions.iter().flat_map(|q| &q.chunks).filter(|c| c.hit).count(),
            passed: keeps && proves,
            sentence: String::new(),
        };
        summary.sentence = summary.say(keeps, proves, timing);
        summary
    }

    fn say(&self, keeps: bool, proves: bool, timing: Option<&TimingRow>) -> String {
        if !proves {
            return format!(
                "FAILED: stale reuse lost only {} of {} answers, fewer than {STALE_MUST_LOSE}: there was nothing to \
                 repair, so this run proves nothing.",
                self.stale_lost, self.questions
            );
        }
        if !keeps {
            return format!(
                "FAILED: reuse kept {} of {} answers at a realised ratio of at most {LARGEST_RATIO}; at least \
                 {MUST_KEEP} of 24 are promised.",
                self.kept_within_ratio, self.questions
            );
        }
        let gain = match timing {
            Some(row) => format!(
                ", and at {} tokens of the larger shape the first token came {:.1}x sooner ({:.0} ms instead of {:.0} ms)",
                row.prompt_tokens, row.speedup, row.reuse_ms, row.full_ms
            ),
            None => String::new(),
        };
        format!(
            "Recomputing at most {:.0} % of the reused tokens kept {} of {} answers of full prefill, where stale reuse \
             lost {}{gain}.",
            self.largest_realised_ratio * 100.0,
            self.kept,
            self.questions,
            self.stale_lost
        )
    }
}

impl Report {
    /// Tables for people, the verdict last.
    pub(crate) fn print(&self, corpus: &Corpus) {
        self.print_example(corpus);
        let mark = |same: bool, text: &str| format!("{} {text}", if same { '=' } else { '!' });
        let rows: Vec<Vec<String>> = self
            .questions
            .iter()
            .map(|q| {
                vec![
                    q.family.name().to_owned(),
                    q.full_answer.clone(),
                    mark(q.answer == q.full_answer, &q.answer),
                    mark(q.stale_answer == q.full_answer, &q.stale_answer),
                    format!("{:.2}", q.realised_ratio),
                    format!("{}/{}", q.chunks.iter().filter(|c| c.hit).count(), q.chunks.len()),
                    format!("{:.1}", q.ttft_ms.cold),
                    format!("{:.1}", q.ttft_ms.full),
                    format!("{:.1}", q.ttft_ms.reuse),
                ]
            })
            .collect();
        text::line("");
        text::line("Answers (= as full prefill, ! not), and milliseconds to the first token:");
        let header =
            ["question", "full prefill", "cacheclip", "stale", "ratio", "hits", "cold", "full", "reuse"];
        text::table(&header, &rows);
        if let Some(row) = &self.timing_row {
            row.print();
        }
        self.print_summary();
    }

    /// One question in full: what was asked, what was recomputed.
    fn print_example(&self, corpus: &Corpus) {
        let Some(q) = self.questions.iter().find(|q| q.family == Family::Link) else { return };
        text::line("");
        text::line(
            "One of the questions, its reports in this order; what CacheClip recomputed stands in [brackets]:",
        );
        for chunk in &q.chunks {
            let text = &corpus.documents[chunk.document].text;
            text::line(format_args!("  {}", bracketed(text, &chunk.recomputed_bytes)));
        }
        text::line(format_args!("  {}", q.question.replace('\n', " ")));
        text::line(format_args!(
            "  cacheclip: {}   full prefill: {}   stale reuse: {}   right: {}",
            q.answer, q.full_answer, q.stale_answer, q.expected
        ));
    }

    fn print_summary(&self) {
        let s = &self.summary;
        let of = |n: usize| format!("{n} of {}", s.questions);
        let rows = [
            ("full prefill is right", of(s.full_right)),
            ("cacheclip says the same", of(s.kept)),
            ("stale reuse says something else", of(s.stale_lost)),
            ("cold and warm chunks differ in the answer", of(s.cold_differs)),
            ("largest realised ratio", format!("{:.3}", s.largest_realised_ratio)),
            ("chunks served from a cache", format!("{} of {}", s.chunks_hit, s.chunks)),
        ];
        let rows: Vec<Vec<String>> = rows.map(|(name, value)| vec![name.to_owned(), value]).to_vec();
        text::line("");
        text::table(&["summary", ""], &rows);
        text::line("");
        text::line(&s.sentence);
    }
}

impl TimingRow {
    fn print(&self) {
        text::line("");
        text::line(format_args!(
            "Milliseconds to the first token, {} tokens in {} chunks, {} (median of {}):",
            self.prompt_tokens, self.chunks, self.shape, self.rounds
        ));
        let row = vec![
            "timing".to_owned(),
            format!("{:.0}", self.cold_ms),
            format!("{:.0}", self.full_ms),
            format!("{:.0}", self.reuse_ms),
            format!("{:.2}", self.realised_ratio),
            format!("{:.1}x", self.speedup),
        ];
        text::table(&["", "cold", "full", "reuse", "ratio", "full/reuse"], &[row]);
        let stages: Vec<String> = self.stages.iter().map(|s| format!("{} {:.0}", s.name, s.ms)).collect();
        text::line(format_args!("reuse by stage, ms: {}", stages.join(", ")));
    }
}

/// `text` with brackets around byte ranges.
fn bracketed(text: &str, ranges: &[(u32, u32)]) -> String {
    let mut out = String::new();
    let mut at = 0;
    for &(start, end) in ranges {
        let (start, end) = (start as usize, end as usize);
        out.push_str(text.get(at..start).unwrap_or_default());
        out.push('[');
        out.push_str(text.get(start..end).unwrap_or_default());
        out.push(']');
        at = end;
    }
    out.push_str(text.get(at..).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(answer: &str, stale: &str, ratio: f32) -> QuestionReport {
        QuestionReport {
            family: Family::Link,
            question: String::new(),
            expected: "a b.".into(),
            answer: answer.into(),
            cold_answer: answer.into(),
            full_answer: "a b.".into(),
            stale_answer: stale.into(),
            rung: "scorer".into(),
            realised_ratio: ratio,
            chunks: Vec::new(),
            ttft_ms: Ttft { cold: 1.0, full: 1.0, reuse: 1.0 },
        }
    }

    fn verdict(kept: usize, lost: usize, ratio: f32) -> Summary {
        let questions: Vec<QuestionReport> = (0..24)
            .map(|i| {
                question(if i < kept { "a b." } else { "c d." }, if i < lost { "x" } else { "a b." }, ratio)
            })
            .collect();
        Summary::judge(&questions, None)
    }

    #[test]
    fn the_demo_passes_only_when_reuse_keeps_and_stale_loses() {
        assert!(verdict(22, 4, 0.2).passed);
        assert!(!verdict(21, 4, 0.2).passed);
        assert!(!verdict(24, 4, 0.26).passed);
        let nothing = verdict(24, 3, 0.2);
        assert!(!nothing.passed && nothing.sentence.contains("proves nothing"));
        assert!(!Summary::judge(&[], None).passed);
    }

    #[test]
    fn recomputed_text_is_marked_where_it_stands() {
        assert_eq!(bracketed("abcdef", &[(1, 3), (5, 6)]), "a[bc]de[f]");
    }
}
