//! Rotary embedding as `config.json` says it: `rope_theta` and `rope_scaling`, or `rope_parameters` with both.

use super::{Family, refuse};
use crate::error::Error;
use cacheclip_kernels::rope::Llama3Scaling;
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Debug, Deserialize)]
pub(super) struct RawRope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    partial_rotary_factor: Option<f64>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Base and scaling of the rotary frequencies. A file that has been through both generations of transformers
/// may say them twice; it must not contradict itself.
pub(super) fn check(
    family: Family,
    theta: Option<f64>,
    scaling: Option<&RawRope>,
    parameters: Option<&RawRope>,
) -> Result<(f64, Option<Llama3Scaling>), Error> {
    let fields = [("rope_parameters", parameters), ("rope_scaling", scaling)];
    let mut theta = theta;
    let mut found = None;
    for (field, raw) in fields.into_iter().filter_map(|(field, raw)| Some((field, raw?))) {
        if let (Some(a), Some(b)) = (theta, raw.rope_theta)
            && a != b
        {
            return Err(refuse(field, format!("its rope_theta {b} contradicts {a}; correct one of them")));
        }
        theta = theta.or(raw.rope_theta);
        if let Some(scaling) = raw.check(field)? {
            if found.is_some_and(|other| other != scaling) {
                return Err(refuse(field, "contradicts rope_parameters; remove one of them".into()));
            }
            found = Some(scaling);
        }
    }
    let theta = match theta {
        Some(theta) => theta,
        // Llama 2 was published before the field existed.
        None if family == Family::Llama => 10_000.0,
        None => {
            let why =
                "absent; write the base that the model was trained with (1000000.0 for Qwen2.5 and Qwen3)";
            return Err(refuse("rope_theta", why.into()));
        }
    };
    if !theta.is_finite() || theta <= 0.0 {
        return Err(refuse("rope_theta", format!("{theta} is not a base of frequencies")));
    }
    Ok((theta, found))
}

impl RawRope {
    fn check(&self, field: &'static str) -> Result<Option<Llama3Scaling>, Error> {
        let need = |value: Option<f64>, name: &str| {
            value.ok_or_else(|| refuse(field, format!("llama3 scaling needs {name}")))
        };
        if let Some((name, _)) = self.others.iter().find(|(_, value)| value.is_object()) {
            let why = format!("{name}: parameters per kind of layer are not supported; choose another model");
            return Err(refuse(field, why));
        }
        if let Some(factor) = self.partial_rotary_factor.filter(|factor| *factor != 1.0) {
            let why = format!("partial_rotary_factor {factor} is not supported; supported: 1.0");
            return Err(refuse(field, why));
        }
        if let (Some(a), Some(b)) = (&self.rope_type, &self.kind)
            && a != b
        {
            return Err(refuse(field, format!("rope_type {a} contradicts type {b}; remove one of them")));
        }
        match self.rope_type.as_deref().or(self.kind.as_deref()) {
            None if self.factor.is_some() => {
                Err(refuse(field, "has a factor but no rope_type; write which scaling it is".into()))
            }
            None | Some("default") => Ok(None),
            Some("llama3") => Ok(Some(Llama3Scaling {
                factor: need(self.factor, "factor")?,
                low_freq_factor: need(self.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: need(self.high_freq_factor, "high_freq_factor")?,
                original_max_position: need(
                    self.original_max_position_embeddings.map(|v| v as f64),
                    "original_max_position_embeddings",
                )? as usize,
            })),
            // Both stretch a context that the model also serves unstretched, if its makers trained it so.
            Some(kind @ ("yarn" | "dynamic")) => Err(refuse(
                field,
                format!(
                    "{kind} is not supported; supported: default, llama3; if the model was trained without it, \
                     remove {kind} and set max_position_embeddings to the original length"
                ),
            )),
            Some(kind) => Err(refuse(
                field,
                format!("{kind} is not supported; supported: default, llama3; choose another model"),
            )),
        }
    }
}
