//! A projection followed by a short convolution with SiLU: how the delta-rule mixers make queries, keys and values.

use anyformer_ops::activation::silu;
use anyformer_ops::{Builder, Linear, Tensor};

use crate::mixer::{Context, Cost, State};
use crate::parts::ShortConv;

pub(crate) struct ShortProjection {
    proj: Linear,
    conv: Option<ShortConv>,
    /// Name of the convolution's last inputs in the state.
    held: &'static str,
}

impl ShortProjection {
    /// `{name}_proj.weight` and, for a width above zero, `{name}_conv1d.weight`; `name` is q, k or v.
    pub(crate) fn new(
        builder: &Builder,
        name: &str,
        dim: usize,
        output: usize,
        width: usize,
    ) -> Self {
        let conv = format!("{name}_conv1d");
        ShortProjection {
            proj: Linear::new(builder, &format!("{name}_proj"), dim, output, false),
            conv: (width > 0).then(|| ShortConv::new(builder, &conv, output, width)),
            held: match name {
                "q" => "conv_q",
                "k" => "conv_k",
                _ => "conv_v",
            },
        }
    }

    /// The projected features `[batch, time, output]` and the named last inputs to carry.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> (Tensor<3>, Option<(&'static str, Tensor<3>)>) {
        let y = self.proj.forward(x);
        match &self.conv {
            None => (silu(y), None),
            Some(conv) => {
                let initial = state.and_then(|state| state.find(self.held));
                let (y, held) = conv.forward(y, initial, context.offsets.clone());
                (y, Some((self.held, held)))
            }
        }
    }

    pub(crate) fn cost(&self, time: usize) -> Cost {
        let weights = self.proj.weight.count();
        let proj = Cost {
            params: weights as u64,
            flops: 2 * (weights * time) as u64,
            state_bytes: 0,
        };
        self.conv
            .as_ref()
            .map_or(proj, |conv| proj + conv.cost(time))
    }
}
