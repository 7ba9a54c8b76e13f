//! The `cacheclip` program as people run it: the demo and its verdict, a fleet and its clients, and plain words for
//! what goes wrong.

use serde_json::Value;
use std::io::{BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Longest run of the program.
const PATIENCE: Duration = Duration::from_secs(240);
/// Largest share of the reused tokens that may be recomputed.
const LARGEST_RATIO: f64 = 0.25;

/// A program that ended.
#[derive(Debug)]
struct Ended {
    status: ExitStatus,
    out: String,
    err: String,
}

/// A program that runs; killed if the test ends before it does.
#[derive(Debug)]
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail where it has ended, and that is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn start(arguments: &[&str]) -> Program {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cacheclip"));
    command.args(arguments).current_dir(root()).env_remove("CACHECLIP_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Program(command.spawn().expect("the program starts"))
}

/// Everything a pipe brings, when it has ended.
fn drained(mut pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = pipe.read_to_string(&mut text);
        // A test that has given up takes nothing any more.
        let _ = sender.send(read.map_or_else(|error| error.to_string(), |_| text));
    });
    receiver
}

fn run(arguments: &[&str]) -> Ended {
    let mut program = start(arguments);
    let out = drained(program.0.stdout.take().expect("a pipe"));
    let err = drained(program.0.stderr.take().expect("a pipe"));
    let text = |pipe: Receiver<String>| match pipe.recv_timeout(PATIENCE) {
        Ok(text) => text,
        Err(_) => panic!("{arguments:?} did not end within {PATIENCE:?}"),
    };
    let (out, err) = (text(out), text(err));
    // Its pipes are closed: it has ended, or is about to.
    Ended { status: program.0.wait().expect("it ends"), out, err }
}

/// One run of the demo, for all tests that look at it.
static DEMO: LazyLock<(Ended, Value)> = LazyLock::new(|| {
    let ended = run(&["demo", "--seed", "7", "--no-timing", "--json"]);
    let report = serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    (ended, report)
});

fn questions() -> &'static [Value] {
    DEMO.1["questions"].as_array().expect("questions")
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("{field} is a text: {value}"))
}

fn number(value: &Value, field: &str) -> f64 {
    value[field].as_f64().unwrap_or_else(|| panic!("{field} is a number: {value}"))
}

/// Questions for which this holds.
fn count(holds: impl Fn(&Value) -> bool) -> usize {
    questions().iter().filter(|question| holds(question)).count()
}

#[test]
fn the_demo_keeps_the_answers_within_its_ratio() {
    let (ended, report) = &*DEMO;
    for question in questions() {
        let ratio = number(question, "realised_ratio");
        assert!((0.0..=LARGEST_RATIO).contains(&ratio), "{ratio}: {question}");
    }
    let kept = count(|question| text(question, "answer") == text(question, "full_answer"));
    assert!(kept >= 22, "{kept} of 24 answers kept; {}", report["summary"]);
    assert_eq!(ended.status.code(), Some(0), "{}", report["summary"]);
}

#[test]
fn stale_reuse_loses_answers_that_the_demo_keeps() {
    let lost = count(|question| text(question, "stale_answer") != text(question, "full_answer"));
    assert!(lost >= 4, "{lost} answers lost: where nothing breaks, a repair proves nothing");
}

#[test]
fn hits_and_misses_give_the_same_answers_in_the_demo() {
    let differ = count(|question| text(question, "cold_answer") != text(question, "answer"));
    assert_eq!(differ, 0);
}

#[test]
fn the_demos_json_tells_of_every_question_its_answers_chunks_and_times() {
    let (_, report) = &*DEMO;
    assert_eq!(report["seed"], 7);
    assert_eq!(questions().len(), 24);
    for question in questions() {
        for answer in ["answer", "full_answer", "stale_answer"] {
            text(question, answer);
        }
        for time in ["cold", "full", "reuse"] {
            assert!(number(&question["ttft_ms"], time) > 0.0, "{question}");
        }
        let chunks = question["chunks"].as_array().expect("chunks");
        assert!(chunks.len() > 1, "{question}");
        for chunk in chunks {
            // Everything was ingested before the first question.
            assert_eq!((&chunk["hit"], text(chunk, "tier")), (&Value::Bool(true), "worker_ram"), "{chunk}");
            assert!(chunk["reason"].is_null(), "a hit has no reason to be a miss: {chunk}");
        }
    }
    let answers: std::collections::HashSet<_> =
        questions().iter().map(|it| text(it, "full_answer")).collect();
    assert!(answers.len() > 12, "questions that differ have answers that differ: {answers:?}");
}

#[test]
fn the_demos_summary_and_exit_code_say_what_its_questions_say() {
    let (ended, report) = &*DEMO;
    let summary = &report["summary"];
    let kept = count(|it| {
        text(it, "answer") == text(it, "full_answer") && number(it, "realised_ratio") <= LARGEST_RATIO
    });
    let lost = count(|it| text(it, "stale_answer") != text(it, "full_answer"));
    assert_eq!(number(summary, "kept_within_ratio") as usize, kept);
    assert_eq!(number(summary, "stale_lost") as usize, lost);
    let passed = kept >= 22 && lost >= 4;
    assert_eq!(summary["passed"], passed);
    assert_eq!(ended.status.code(), Some(if passed { 0 } else { 1 }));
    assert_eq!(text(summary, "sentence").contains("FAILED"), !passed);
}

/// It failed, and its last words name what was wrong: no panic, no usage of something else.
fn complains(arguments: &[&str], of: &[&str]) -> Ended {
    let ended = run(arguments);
    assert!(!ended.status.success(), "{arguments:?}: {ended:?}");
    assert!(ended.status.code().is_some_and(|code| code != 101), "{arguments:?}: {ended:?}");
    for word in of {
        assert!(ended.err.contains(word), "{arguments:?} says nothing of {word:?}: {ended:?}");
    }
    ended
}

#[test]
fn a_wrong_argument_is_named_and_ends_the_program() {
    let ratio = complains(&["demo", "--seed", "7", "--no-timing", "--json", "--ratio", "2"], &["ratio", "2"]);
    assert!(ratio.out.is_empty(), "no report of a run that was refused: {}", ratio.out);
    complains(&["demo", "--ratio", "much"], &["--ratio", "much"]);
    complains(&["demo", "--sede", "7"], &["--sede"]);
    complains(&["dance"], &["dance"]);
    complains(&["demo", "--no-timing", "--models", "no/such/models"], &["no/such/models"]);
    complains(
        &["ask", "--chunk", "no/such/file", "Why?", "--gateway", "http://127.0.0.1:1"],
        &["127.0.0.1:1"],
    );
    complains(&["ingest", "a.txt", "--gateway", "http://127.0.0.1:1"], &["127.0.0.1:1"]);
}

#[test]
fn a_directory_that_cannot_be_used_is_named_in_one_line() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let data = file.path().join("data").display().to_string();
    let ended = complains(
        &["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data", &data],
        &["cacheclip: ", &data],
    );
    assert_eq!(ended.err.lines().count(), 1, "{}", ended.err);
}

#[test]
fn help_names_every_command_and_every_command_has_help() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    let listed: Vec<&str> = help
        .out
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    for command in ["demo", "serve", "ask", "ingest", "metrics", "world"] {
        assert!(listed.contains(&command), "{command} is not among {listed:?}: {}", help.out);
    }
    for command in listed.into_iter().filter(|command| *command != "help") {
        let own = run(&[command, "--help"]);
        assert!(own.status.success() && own.out.contains("Usage: cacheclip"), "{command}: {own:?}");
    }
}

#[test]
fn the_same_seed_prints_the_same_world() {
    let [first, again, other] = ["5", "5", "6"].map(|seed| run(&["world", "--seed", seed]).out);
    let world: Value = serde_json::from_str(&first).expect("JSON");
    assert_eq!(world["questions"].as_array().map(Vec::len), Some(24));
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[test]
fn a_served_fleet_takes_files_answers_about_them_and_drains_when_told_to() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let report = |n: usize| format!("Report from Ashmoor. Belmon keeps the sunny bell near gate {n}.");
    let paragraphs: Vec<String> = (0..20).map(report).collect();
    std::fs::write(path("many.txt"), paragraphs.join("\n\n")).expect("written");
    std::fs::write(path("one.txt"), &paragraphs[0]).expect("written");

    let mut fleet =
        start(&["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data", &path("data")]);
    let (lines, told) = channel();
    let out = BufReader::new(fleet.0.stdout.take().expect("a pipe"));
    std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
    let gateway = told.recv_timeout(PATIENCE).expect("it says where it listens");
    let gateway = gateway.strip_prefix("gateway ").unwrap_or_else(|| panic!("{gateway}"));

    let many = path("many.txt");
    for computed in [20, 0] {
        let ingested = run(&["ingest", &many, "--gateway", gateway]);
        let expected = format!("20 chunks, {computed} computed now, ");
        assert!(ingested.out.starts_with(&expected), "{expected:?} is expected: {ingested:?}");
    }
    let one = path("one.txt");
    let question = "\nQuestion: what does Belmon keep?\nAnswer: Belmon's";
    let asked = run(&["ask", "--explain", "--gateway", gateway, "--chunk", &one, "--chunk", &many, question]);
    assert!(asked.status.success(), "{asked:?}");
    for words in ["policy cacheclip on rung scorer", "chunk 0: ", "hit (worker_ram)", "never_seen"] {
        assert!(asked.out.contains(words), "{words:?} is expected: {asked:?}");
    }
    complains(&["ask", "--gateway", gateway, "--policy", "fastest", question], &["policy", "fastest"]);
    complains(&["ask", "--gateway", gateway, "--chunk", "no/such/file", question], &["no/such/file"]);

    let stopped = Command::new("kill").args(["-TERM", &fleet.0.id().to_string()]).status();
    assert!(stopped.is_ok_and(|status| status.success()));
    let err = drained(fleet.0.stderr.take().expect("a pipe"));
    assert_eq!(err.recv_timeout(PATIENCE).expect("it drains"), "");
    assert_eq!(fleet.0.wait().expect("it ended").code(), Some(0));
}
