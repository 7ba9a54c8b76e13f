//! Tasks from files in RULER's and LongBench's JSONL forms, for models that read such text.
//!
//! ```text
//! ruler      {"input": "instruction\ncontext …\nquestion", "outputs": ["…"], "index": 0, "answer_prefix": "…"}
//! longbench  {"input": "question", "context": "…", "answers": ["…"], "dataset": "…"}
//! ```
//!
//! Of RULER's input the first line is the prefix and the last one the question, with `answer_prefix` (where there is
//! one) behind it; what stands between is the context. A context becomes chunks of whole lines, up to a number of
//! words; longer lines are cut between words.

use super::Error;
use super::task::{Scoring, Task};
use serde_json::{Map, Value};
use std::path::Path;

/// Tokens of an answer, as RULER allows for its longest.
const RULER_TOKENS: usize = 128;
/// As LongBench allows for its question answering.
const LONGBENCH_TOKENS: usize = 64;

/// The form of a task file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// RULER's `validation.jsonl`.
    Ruler,
    /// LongBench's `data/*.jsonl`.
    LongBench,
}

/// Reads a task file; contexts are cut into chunks of at most `words` words.
///
/// # Errors
/// A file that cannot be read, or the first malformed line with its number and the field that is wrong.
pub fn read_tasks(path: &Path, format: Format, words: usize) -> Result<Vec<Task>, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let family = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    let mut tasks: Vec<Task> = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = |(field, why): (String, String)| Error::Line {
            path: path.to_owned(),
            line: number + 1,
            field,
            why,
        };
        let value: Value =
            serde_json::from_str(line).map_err(|error| at(("line".into(), error.to_string())))?;
        let object = value.as_object().ok_or_else(|| at(("line".into(), "an object is wanted".into())))?;
        let task = match format {
            Format::Ruler => ruler(object, &family, words),
            Format::LongBench => longbench(object, &family, words),
        };
        let task = task.map_err(at)?;
        let index = tasks.iter().filter(|known| known.family == task.family).count();
        tasks.push(Task { index, ..task });
    }
    if tasks.is_empty() {
        return Err(Error::Settings(format!("{} holds no tasks", path.display())));
    }
    Ok(tasks)
}

/// A field's name, and what is wrong with it.
type Wrong = (String, String);

fn ruler(object: &Map<String, Value>, family: &str, words: usize) -> Result<Task, Wrong> {
    let input = text(object, "input")?.trim();
    let answers = texts(object, "outputs")?;
    let lines: Vec<&str> = input.lines().collect();
    let (Some((first, rest)), true) = (lines.split_first(), lines.len() >= 3) else {
        let why = "an instruction, a context and a question are wanted, each on lines of its own";
        return Err(("input".into(), why.into()));
    };
    let (last, context) = rest.split_last().map_or(("", &[][..]), |(last, context)| (*last, context));
    let behind = match object.get("answer_prefix") {
        Some(_) => text(object, "answer_prefix")?,
        None => "",
    };
    Ok(Task {
        family: family.to_owned(),
        index: 0,
        prefix: Some((*first).to_owned()),
        chunks: chunks(context, words),
        question: format!("\n{last}{behind}"),
        answers,
        scoring: Scoring::Contains,
        max_tokens: RULER_TOKENS,
        decisive: Vec::new(),
    })
}

fn longbench(object: &Map<String, Value>, family: &str, words: usize) -> Result<Task, Wrong> {
    let question = text(object, "input")?.trim();
    let context: Vec<&str> = text(object, "context")?.lines().collect();
    let answers = texts(object, "answers")?;
    let family = match object.get("dataset") {
        Some(_) => text(object, "dataset")?,
        None => family,
    };
    // Classes are named in an answer or not; words of free answers are compared.
    let classes = object.get("all_classes").is_some_and(|classes| !classes.is_null());
    Ok(Task {
        family: family.to_owned(),
        index: 0,
        prefix: None,
        chunks: chunks(&context, words),
        question: format!("\nQuestion: {question}\nAnswer:"),
        answers,
        scoring: if classes { Scoring::Contains } else { Scoring::F1 },
        max_tokens: LONGBENCH_TOKENS,
        decisive: Vec::new(),
    })
}

fn text<'a>(object: &'a Map<String, Value>, field: &str) -> Result<&'a str, Wrong> {
    let value = object.get(field).ok_or_else(|| (field.to_owned(), "missing".to_owned()))?;
    let text = value.as_str().ok_or_else(|| (field.to_owned(), format!("a text is wanted, not {value}")))?;
    if text.trim().is_empty() {
        return Err((field.to_owned(), "empty".to_owned()));
    }
    Ok(text)
}

fn texts(object: &Map<String, Value>, field: &str) -> Result<Vec<String>, Wrong> {
    let value = object.get(field).ok_or_else(|| (field.to_owned(), "missing".to_owned()))?;
    let wrong = || (field.to_owned(), format!("a list of at least one text is wanted, not {value}"));
    let list = value.as_array().filter(|list| !list.is_empty()).ok_or_else(wrong)?;
    list.iter().map(|it| it.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
}

/// Whole lines up to `words` words a chunk; longer lines cut between words.
fn chunks(lines: &[&str], words: usize) -> Vec<String> {
    let words = words.max(1);
    let mut chunks: Vec<(String, usize)> = Vec::new();
    for line in lines.iter().filter(|line| !line.trim().is_empty()) {
        let parts: Vec<&str> = line.split_whitespace().collect();
        for part in parts.chunks(words) {
            let piece = if part.len() == parts.len() { (*line).to_owned() } else { part.join(" ") };
            match chunks.last_mut() {
                Some((text, count)) if *count + part.len() <= words => {
                    text.push('\n');
                    text.push_str(&piece);
                    *count += part.len();
                }
                _ => chunks.push((piece, part.len())),
            }
        }
    }
    chunks.into_iter().map(|(text, _)| text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_become_chunks_of_whole_lines_up_to_the_limit() {
        let lines = ["a b c", "", "d e", "f g h i j k l", "m"];
        assert_eq!(chunks(&lines, 5), ["a b c\nd e", "f g h i j", "k l\nm"]);
        assert_eq!(chunks(&lines, 100).len(), 1);
    }

    #[test]
    fn malformed_lines_are_named_by_number_and_field() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tasks.jsonl");
        let good = r#"{"input": "i\nc\nq", "outputs": ["a"]}"#;
        for (bad, place) in [
            (r#"{"input": "i\nc\nq", "outputs": "a"}"#, "tasks.jsonl:3: outputs: a list"),
            (r#"{"input": "i\nc\nq", "outputs": []}"#, "tasks.jsonl:3: outputs: a list"),
            (r#"{"outputs": ["a"]}"#, "tasks.jsonl:3: input: missing"),
            (r#"{"input": 3, "outputs": ["a"]}"#, "tasks.jsonl:3: input: a text"),
            (r#"{"input": "one line", "outputs": ["a"]}"#, "tasks.jsonl:3: input: an instruction"),
            (r#"{"input": "#, "tasks.jsonl:3: line: "),
            ("[]", "tasks.jsonl:3: line: an object"),
        ] {
            std::fs::write(&path, format!("{good}\n\n{bad}\n")).unwrap();
            let error = read_tasks(&path, Format::Ruler, 64).unwrap_err().to_string();
            assert!(error.contains(place), "{error} names {place}");
        }
        std::fs::write(&path, r#"{"input": "q", "context": "c", "answers": [1]}"#).unwrap();
        let error = read_tasks(&path, Format::LongBench, 64).unwrap_err().to_string();
        assert!(error.contains("tasks.jsonl:1: answers"), "{error}");
        std::fs::write(&path, "\n").unwrap();
        assert!(read_tasks(&path, Format::Ruler, 64).unwrap_err().to_string().contains("no tasks"));
    }
}
