//! Where the model is computed, and what keeps it from being computed there.

use crate::engine::{self, Engine};
use crate::metrics;
use crate::options::{Options, Processor};
use cacheclip_chunk::Dtype;
use cacheclip_kernels::cuda::{DeviceError, Unsupported, code};
use cacheclip_model::config::Config;
use cacheclip_model::kv::HostPool;
use cacheclip_model::load::{Source, load};
use cacheclip_model::pages::{page_bytes, pages_for};
use cacheclip_model::{Cpu, Device, Error, certificate};
use cacheclip_prompt::Tokenizer;
use cacheclip_service::Failure;

/// An engine that runs, and what others need to know of its model and its device.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) engine: Engine,
    pub(crate) config: Config,
    pub(crate) weights_digest: [u8; 32],
    /// Of its KV.
    pub(crate) dtype: Dtype,
    /// Where its KV is kept.
    pub(crate) host: HostPool,
    /// Pages of running sequences.
    pub(crate) pages: usize,
}

/// Loads the model to where it is computed, proves the instance, and starts the engine. Sections of up to `longest` tokens
/// are encoded.
///
/// # Errors
/// A model that cannot be loaded or proven, a budget too small for one page; a [`Failure`] for a device that is not there
/// or not enough.
pub(crate) fn begin(
    options: &Options,
    (source, config): (&Source, &Config),
    tokenizer: Tokenizer,
    longest: usize,
) -> anyhow::Result<Begun> {
    let plan = |element: usize| -> anyhow::Result<engine::Options> {
        let pages = pages_within(options.page_bytes, config, element);
        anyhow::ensure!(pages > 0, "page_bytes: {} holds no page of this model", options.page_bytes);
        Ok(engine::Options {
            pages,
            longest,
            queue: options.queue,
            prefill_rows: options.prefill_rows,
            shadow_ratio: options.shadow_ratio,
        })
    };
    match options.device.chosen() {
        Processor::Cuda => {
            let engine = plan(Dtype::Bf16.size())?;
            let device = cuda(config, options, &engine).map_err(failure)?;
            on(device, source, tokenizer, engine)
        }
        Processor::Cpu | Processor::Auto => on(Cpu, source, tokenizer, plan(Dtype::F32.size())?),
    }
}

fn on<D: Device>(
    device: D,
    source: &Source,
    tokenizer: Tokenizer,
    options: engine::Options,
) -> anyhow::Result<Begun> {
    let loaded = load(source, device).map_err(failure)?;
    let certificate = certificate::certify(&loaded.decoder).map_err(failure)?;
    tracing::info!(%certificate, "instance certified");
    let (decoder, weights_digest) = (loaded.decoder, loaded.weights_digest);
    metrics::weights(decoder.weight_bytes());
    let (dtype, host, config) = (decoder.device().dtype(), decoder.device().host(), decoder.config().clone());
    let pages = options.pages;
    let engine = Engine::start(decoder, tokenizer, options)?;
    Ok(Begun { engine, config, weights_digest, dtype, host, pages })
}

#[cfg(feature = "cuda")]
fn cuda(
    config: &Config,
    options: &Options,
    engine: &engine::Options,
) -> Result<cacheclip_model::cuda::Cuda, Error> {
    use cacheclip_model::cuda::{self, Cuda};
    /// Page-locked bytes of lists that go to the device in a step, and of logits that come from it.
    const STEP_BYTES: u64 = 128 << 20;
    let of = &options.cuda;
    let device = Cuda::open(
        config,
        &cuda::Options {
            ordinal: of.ordinal,
            memory_bytes: (of.memory_bytes > 0).then_some(of.memory_bytes),
            // Sections are encoded on pages of their own.
            pages: engine.pages + pages_for(engine.longest),
            block_rows: of.block_rows.max(1),
            // The RAM tier, and what requests hold beside it; an eighth for rounding, and lists and logits of steps.
            pinned_bytes: (options.ram_bytes + options.load_bytes) / 8 * 9 + STEP_BYTES,
            overlap: of.overlap,
            libraries: of.libraries.clone(),
            kept: of.kept.clone(),
        },
    )?;
    let (_, memory) = device.memory();
    tracing::info!(device = device.description(), memory, "CUDA device opened");
    Ok(device)
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: &Config, _: &Options, engine: &engine::Options) -> Result<Cpu, Error> {
    // Named, so that both builds read the same fields.
    let _ = pages_for(engine.longest);
    Err(Error::Device(DeviceError::Toolkit(WITHOUT.into())))
}

#[cfg(not(feature = "cuda"))]
const WITHOUT: &str = "device = \"cuda\": this worker was built without CUDA; take the image whose name ends with -cuda, \
                       or build with --features cuda";

/// An error with its exit code, where it has one of its own.
fn failure(error: Error) -> anyhow::Error {
    let code = match &error {
        Error::Device(DeviceError::Toolkit(_)) if !cfg!(feature = "cuda") => code::BUILD,
        Error::Device(DeviceError::NoDevice(_)) => code::NO_DEVICE,
        Error::Device(DeviceError::Unsupported(Unsupported::Capability(..))) => code::CAPABILITY,
        Error::Device(DeviceError::Unsupported(_)) => code::MODEL,
        Error::Device(DeviceError::OldDriver(_)) => code::DRIVER,
        Error::Device(DeviceError::Toolkit(_)) => code::TOOLKIT,
        Error::Device(DeviceError::OutOfMemory { .. }) | Error::TooLarge(_) => code::MEMORY,
        _ => return error.into(),
    };
    Failure { code, why: error.to_string() }.into()
}

/// Pages that fit a budget, but no more than a hundred of the longest sequences could fill.
fn pages_within(bytes: u64, config: &Config, element: usize) -> usize {
    let most = 100 * pages_for(config.max_positions);
    usize::try_from(bytes / page_bytes(config, element).max(1)).unwrap_or(usize::MAX).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_model::cuda::{Footprint, TooLarge};

    fn code_of(error: Error) -> Option<u8> {
        let error = failure(error);
        assert_eq!(format!("{error:#}").lines().count(), 1, "{error:#}");
        error.downcast_ref::<Failure>().map(|failure| failure.code)
    }

    #[test]
    fn what_keeps_a_device_from_computing_is_one_line_with_a_code_of_its_own() {
        let needed = Footprint { weights: 1, pages: 1, workspace: 1, step: 1 };
        let device = |error: DeviceError| code_of(Error::Device(error));
        let codes = [
            device(DeviceError::NoDevice("no driver".into())),
            device(Unsupported::Capability(7, 5).into()),
            device(DeviceError::OldDriver("it is of CUDA 12.4".into())),
            device(DeviceError::Toolkit("cuBLAS was not found".into())),
            code_of(Error::TooLarge(TooLarge { needed, limit: 2 })),
            device(Unsupported::HeadDim(80).into()),
        ];
        let toolkit = if cfg!(feature = "cuda") { code::TOOLKIT } else { code::BUILD };
        let own = [code::NO_DEVICE, code::CAPABILITY, code::DRIVER, toolkit, code::MEMORY, code::MODEL];
        assert_eq!(codes, own.map(Some));
        assert_eq!(code_of(Error::Weights("missing".into())), None);
    }

    #[test]
    fn pages_of_half_the_width_are_twice_as_many() {
        let config = Config::shape("aux-30m").expect("a known shape");
        let bytes = 100 * page_bytes(&config, 4);
        assert_eq!((pages_within(bytes, &config, 4), pages_within(bytes, &config, 2)), (100, 200));
    }
}
