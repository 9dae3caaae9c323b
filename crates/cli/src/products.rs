//! How a loaded model multiplies: flags of everything that runs one.

use anyformer_hub::ModelFolder;
use anyformer_models::{Model, Precision};
use anyformer_ops::Device;

use crate::exit::{Failure, Kind, bad_input};

/// Flags.
#[derive(Debug, Default, clap::Args)]
pub struct Products {
    /// What products of linear layers and of exact attention round their operands to; bf16 reads prompts faster where the processor has AVX512-BF16, and is less near to the model [default: what the model's config says, else f32]
    #[arg(long, value_name = "PRECISION", value_parser = ["f32", "bf16"])]
    pub precision: Option<String>,
    /// Round inputs of layers whose weights are packed in 8 or 4 bits to 8 bits, group by group, as llama.cpp does: less near to the model
    #[arg(long)]
    pub round_inputs: bool,
}

impl Products {
    /// The model of a folder, multiplying so.
    pub(crate) fn load(&self, opened: &mut ModelFolder, device: &Device) -> Result<Model, Failure> {
        match self.precision.as_deref() {
            Some("bf16") => opened.config.precision = Precision::Bf16,
            Some(_) => opened.config.precision = Precision::F32,
            None => {}
        }
        let model = opened.load(device).input()?;
        round_inputs(&model, self.round_inputs)?;
        Ok(model)
    }
}

/// Turns the rounding of inputs on where it is asked for; refuses it where it would do nothing.
pub(crate) fn round_inputs(model: &Model, on: bool) -> Result<(), Failure> {
    let any = model.params().round_inputs(on);
    match on && !any {
        true => Err(bad_input(
            "round inputs: no weight of the model is packed in 8 or 4 bits; pack them first (anyformer convert quantize)",
        )),
        false => Ok(()),
    }
}
