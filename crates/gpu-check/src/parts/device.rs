//! The device and what it does at most: copying, and PyTorch's largest product.

use super::times::Copy;
use crate::work::Work;
use cacheclip_bench::runs::Runs;
use cacheclip_kernels::cuda::Heads;
use cacheclip_kernels::cuda::timing::Stand;
use serde::Serialize;
use serde_json::json;

/// Attention of the tiny pair: any will do.
pub const HEADS: Heads = Heads { queries: 4, kv: 2, dim: 32 };
/// Side of the product.
const SIDE: usize = 8192;
/// Products in a round.
const PRODUCTS: usize = 10;

/// What is known about the device.
#[derive(Debug, Serialize)]
struct Row {
    row: &'static str,
    name: String,
    /// Bytes per second of copies on the device, read and written counted.
    copy_bytes_per_second: Option<Runs>,
    /// Of copies of page-locked bytes of the host to the device.
    upload_bytes_per_second: Option<Runs>,
}

/// What is known about the peer.
#[derive(Debug, Serialize)]
struct Other {
    row: &'static str,
    /// Of PyTorch's product of two bf16 matrices of 8,192 x 8,192.
    product_flops_per_second: Option<Runs>,
    /// The peer's version, or why there is none.
    peer: String,
}

/// Gives the row of a device of this name, and then the peer's, which may take its time to start.
///
/// # Errors
/// Nobody reads.
pub fn give(work: &Work, name: String, rates: Option<[Vec<f64>; 2]>) -> anyhow::Result<()> {
    let [copies, uploads] = rates.map_or([None, None], |rates| rates.map(|it| Some(Runs::of(it))));
    let (copy_bytes_per_second, upload_bytes_per_second) = (copies, uploads);
    work.row(&Row { row: "device", name, copy_bytes_per_second, upload_bytes_per_second })?;
    let mut products = Vec::new();
    let mut measure = |mut peer: crate::work::Peer| -> anyhow::Result<String> {
        let request = json!({ "op": "product", "side": SIDE, "times": PRODUCTS });
        for round in 0..=work.scale.rounds {
            let seconds = peer.number(&request, "seconds")?;
            if round > 0 {
                products.push(2.0 * (SIDE as f64).powi(3) / seconds);
            }
        }
        Ok(peer.version)
    };
    let peer = work.peer().and_then(|peer| measure(peer).map_err(|error| format!("{error:#}")));
    work.row(&Other {
        row: "peer",
        product_flops_per_second: (!products.is_empty()).then(|| Runs::of(products)),
        peer: peer.unwrap_or_else(|why| format!("none: {why}")),
    })
}

/// Gives the row of a stand's machine.
///
/// # Errors
/// A device fault.
pub fn run(work: &Work, stand: &Stand) -> anyhow::Result<()> {
    let copy = Copy::new(stand, work.scale.copy)?;
    let upload = stand.upload(work.scale.copy / 4)?;
    let mut rates = [Vec::new(), Vec::new()];
    // The first rounds bring the clocks up.
    for round in 0..3 * work.scale.rounds {
        let now = [copy.bytes_per_second()?, upload.floor().bytes as f64 / upload.seconds(5)?];
        if round >= 2 * work.scale.rounds {
            rates.iter_mut().zip(now).for_each(|(rates, now)| rates.push(now));
        }
    }
    let machine = stand.machine();
    let free = machine.free_memory()? as f64 / f64::from(1 << 30);
    give(work, format!("{}, {free:.0} GiB free", machine.description()), Some(rates))
}
