//! `cacheclip-gpu-check`: see the library.

use cacheclip_gpu_check::bed::Rehearsal;
use cacheclip_gpu_check::budget::Deadline;
use cacheclip_gpu_check::conduct::{Conduct, arguments};
use cacheclip_gpu_check::parts::{self, Part};
use cacheclip_gpu_check::report::Report;
use cacheclip_gpu_check::scale::Scale;
use cacheclip_gpu_check::work::{Sink, Work};
use cacheclip_gpu_check::{code, find};
use clap::Parser;
use serde_json::json;
use std::io::Write as _;
#[cfg(feature = "cuda")]
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

/// Checks and times the worker's CUDA device on this machine. Builds nothing, and needs no network.
#[derive(Debug, Parser)]
#[command(name = "cacheclip-gpu-check", version)]
struct Arguments {
    /// Parts to do, in this order; `device` comes first in any case.
    #[arg(long, value_delimiter = ',')]
    parts: Vec<Part>,
    /// Seconds for all of them.
    #[arg(long, default_value_t = 540.0)]
    seconds: f64,
    /// The report, written after every row.
    #[arg(long, default_value = "gpu-check.json")]
    out: PathBuf,
    /// Python with PyTorch for CUDA, for peers.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// Measure no peers.
    #[arg(long)]
    no_peers: bool,
    /// Folder with NVRTC's and cuBLAS's libraries; else a toolkit's, PyTorch's, or wherever the loader looks.
    #[arg(long)]
    libraries: Option<PathBuf>,
    /// Folder with compiled kernels; else `kernels` beside this program.
    #[arg(long)]
    kernels: Option<PathBuf>,
    /// Folder with the tiny models; else `models` beside this program.
    #[arg(long)]
    models: Option<PathBuf>,
    /// The kernels' program of tests; else `cuda-kernels` beside this program.
    #[arg(long)]
    checks: Option<PathBuf>,
    /// The peers' script; else `torch_gpu.py` beside this program.
    #[arg(long)]
    script: Option<PathBuf>,
    /// Runs on the CPU, with tiny shapes: tries this program, measures nothing.
    #[arg(long)]
    rehearse: bool,
    /// Compiles the kernels of every shape into `--kernels` for devices of these compute capabilities, and stops.
    #[arg(long, value_delimiter = ',', value_name = "MAJOR.MINOR")]
    keep: Vec<String>,
    /// Does one part in this process: rows go to standard output.
    #[arg(long, hide = true)]
    part: Option<Part>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    arguments.find();
    let done = match arguments.part {
        _ if !arguments.keep.is_empty() => keep(&arguments).map(|()| ExitCode::SUCCESS),
        Some(part) => told(&arguments.work(), |work| one(part, &arguments, work)),
        None => all(&arguments),
    };
    done.unwrap_or_else(|error| {
        // Nobody is left to tell when standard error is closed.
        _ = writeln!(std::io::stderr().lock(), "cacheclip-gpu-check: {error:#}");
        ExitCode::from(nothing(&error).unwrap_or(1))
    })
}

impl Arguments {
    /// Fills in what was not named and is there.
    fn find(&mut self) {
        let beside = |path: &mut Option<PathBuf>, name| *path = path.take().or_else(|| find::beside(name));
        beside(&mut self.kernels, "kernels");
        beside(&mut self.models, "models");
        beside(&mut self.checks, "cuda-kernels");
        beside(&mut self.script, "torch_gpu.py");
        if self.libraries.is_none() && self.part.is_none() && !self.rehearse {
            self.libraries = find::libraries(Some(&self.python));
        }
    }

    #[cfg(feature = "cuda")]
    fn toolkit(&self) -> cacheclip_kernels::cuda::device::Toolkit {
        let (libraries, kept) = (self.libraries.clone(), self.kernels.clone());
        cacheclip_kernels::cuda::device::Toolkit { libraries, kept }
    }

    fn work(&self) -> Work {
        Work {
            deadline: Deadline::within(self.seconds),
            scale: if self.rehearse { Scale::REHEARSAL } else { Scale::FULL },
            python: (!self.no_peers && !self.rehearse).then(|| self.python.clone()),
            script: self.script.clone().unwrap_or_default(),
            models: self.models.clone().unwrap_or_else(|| "models/tiny".into()),
            sink: Sink::Lines,
        }
    }
}

/// All parts, each in a process of its own.
fn all(options: &Arguments) -> anyhow::Result<ExitCode> {
    let mut parts = vec![Part::Device];
    let chosen = if options.parts.is_empty() { &Part::ALL[..] } else { &options.parts[..] };
    parts.extend(chosen.iter().copied().filter(|&part| part != Part::Device));
    let mut passed_on = arguments(
        &[
            ("python", Some(&options.python)),
            ("libraries", options.libraries.as_deref()),
            ("kernels", options.kernels.as_deref()),
            ("models", options.models.as_deref()),
            ("checks", options.checks.as_deref()),
            ("script", options.script.as_deref()),
        ],
        options.rehearse,
    );
    passed_on.extend(options.no_peers.then(|| "--no-peers".to_owned()));
    let conduct = Conduct {
        program: std::env::current_exe()?,
        arguments: passed_on,
        seconds: options.seconds,
        out: options.out.clone(),
    };
    let mut report = Report::begin(options.rehearse);
    if let Some(code) = conduct.run(&parts, &mut report)? {
        // The part has said why.
        _ = std::fs::remove_file(&options.out);
        return Ok(ExitCode::from(code));
    }
    report.write(&options.out)?;
    let text = format!("{}\n{}", report.text(), options.out.display());
    _ = writeln!(std::io::stdout().lock(), "{text}");
    Ok(match (report.passed(), report.whole(&parts)) {
        (false, _) => ExitCode::FAILURE,
        (true, false) => ExitCode::from(code::CUT),
        (true, true) => ExitCode::SUCCESS,
    })
}

/// Does a part. What stops it is a row, too: who reads the report has not seen standard error.
fn told(work: &Work, part: impl FnOnce(&Work) -> anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let (sink, usual) = (work.clone(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        // Nobody reads any more.
        _ = sink.row(&json!({ "row": "error", "said": panic.to_string() }));
        usual(panic);
    }));
    let done = part(work);
    match &done {
        Err(error) if nothing(error).is_none() => {
            work.row(&json!({ "row": "error", "said": format!("{error:#}") }))?;
        }
        _ => {}
    }
    done.map(|()| if work.deadline.passed() { ExitCode::from(code::CUT) } else { ExitCode::SUCCESS })
}

/// One part, here.
fn one(part: Part, options: &Arguments, work: &Work) -> anyhow::Result<()> {
    if options.rehearse {
        return match part {
            Part::Device => parts::device::give(work, "no GPU: a rehearsal on the CPU".into(), None),
            _ => parts::run(part, &Rehearsal, work).map(|_| ()),
        };
    }
    gpu(part, options, work)
}

#[cfg(feature = "cuda")]
fn gpu(part: Part, options: &Arguments, work: &Work) -> anyhow::Result<()> {
    let bed = cacheclip_gpu_check::bed::Gpu(options.toolkit());
    match part {
        Part::Device => parts::device::run(work, &bed.stand(parts::device::HEADS)?),
        Part::Times => parts::times::run(work, |heads| bed.stand(heads)),
        Part::Kernels => {
            let program = options.checks.as_deref().unwrap_or(Path::new("cuda-kernels"));
            parts::kernels::run(work, program, options.libraries.as_deref(), options.kernels.as_deref())
        }
        _ => parts::run(part, &bed, work).map(|_| ()),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu(_part: Part, _options: &Arguments, _work: &Work) -> anyhow::Result<()> {
    Err(NoCuda.into())
}

/// This build computes on the CPU alone.
#[cfg(not(feature = "cuda"))]
#[derive(Debug)]
struct NoCuda;

#[cfg(not(feature = "cuda"))]
impl std::fmt::Display for NoCuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(
            "built without the feature cuda: scripts/cuda-build builds with it, --rehearse runs on the CPU",
        )
    }
}

#[cfg(not(feature = "cuda"))]
impl std::error::Error for NoCuda {}

/// The exit code of an error that says that there is nothing to run on.
#[cfg(feature = "cuda")]
fn nothing(error: &anyhow::Error) -> Option<u8> {
    use cacheclip_kernels::cuda::{DeviceError, Unsupported};
    let of = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<cacheclip_model::Error>()
    {
        Some(cacheclip_model::Error::Device(device)) => Some(device.clone()),
        _ => cause.downcast_ref::<DeviceError>().cloned(),
    };
    Some(match error.chain().find_map(of)? {
        DeviceError::NoDevice(_) => code::NO_DEVICE,
        DeviceError::Unsupported(Unsupported::Capability(..)) => code::CAPABILITY,
        DeviceError::OldDriver(_) => code::DRIVER,
        DeviceError::Toolkit(_) => code::TOOLKIT,
        _ => return None,
    })
}

#[cfg(not(feature = "cuda"))]
fn nothing(error: &anyhow::Error) -> Option<u8> {
    error.is::<NoCuda>().then_some(code::BUILD)
}

/// Compiles kernels for machines that have no compiler.
#[cfg(feature = "cuda")]
fn keep(options: &Arguments) -> anyhow::Result<()> {
    use anyhow::Context as _;
    use cacheclip_model::config::Config;
    let toolkit = options.toolkit();
    anyhow::ensure!(toolkit.kept.is_some(), "--kernels: name the folder to keep kernels in");
    let mut shapes: Vec<_> = Config::SHAPES.into_iter().filter_map(Config::shape).collect();
    shapes.push(Config::from_dir(&options.work().models.join("primary"))?);
    for capability in &options.keep {
        let parsed = capability.split_once('.').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let of =
            parsed.with_context(|| format!("--keep: {capability:?} is no compute capability, as 9.0"))?;
        for shape in &shapes {
            toolkit.keep(parts::times::heads(shape), of)?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn keep(_options: &Arguments) -> anyhow::Result<()> {
    Err(NoCuda.into())
}
