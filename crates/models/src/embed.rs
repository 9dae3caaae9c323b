//! What stands before the first block: token vectors or projected patches, positions, token types, a norm, a layer to the
//! width of the blocks.

use std::sync::Arc;

use anyformer_mixers::{Context, Cost, State};
use anyformer_ops::embedding::{embedding, embedding_of};
use anyformer_ops::{Builder, Device, Init, Linear, Param, Tensor};

use crate::block::Norm;
use crate::config::{Gives, ModelConfig, ModelError, Pool, Positions, Reads};
use crate::rows::Sinusoids;

enum Source {
    Tokens { weight: Param, vocab: usize },
    Patches { proj: Linear, reads: [usize; 4] },
}

/// Token ids or pictures to `[batch, time, dim]`.
pub(crate) struct Embed {
    source: Source,
    fixed: Positions,
    positions: Option<Param>,
    sinusoids: Sinusoids,
    types: Option<Param>,
    norm: Option<Norm>,
    proj: Option<Linear>,
}

impl Embed {
    pub(crate) fn new(config: &ModelConfig, builder: &Builder) -> Self {
        let dim = match config.embed_dim {
            0 => config.dim,
            own => own,
        };
        let source = match config.reads {
            Reads::Tokens { vocab } => Source::Tokens {
                weight: builder.at("embed").matrix(
                    "weight",
                    &[vocab, dim],
                    Init::Normal(config.embed_std),
                ),
                vocab,
            },
            Reads::Patches {
                height,
                width,
                channels,
                patch,
            } => Source::Patches {
                proj: Linear::new(builder, "embed", patch * patch * channels, dim, true),
                reads: [height, width, channels, patch],
            },
        };
        let table = |name: &str, rows: usize| {
            builder
                .at(name)
                .param_no_decay("weight", &[rows, dim], Init::Normal(0.02))
        };
        // The class token takes a position more.
        let class_token = matches!(
            config.gives,
            Gives::Class {
                pool: Pool::Cls,
                ..
            }
        );
        Embed {
            source,
            fixed: config.positions,
            positions: (config.positions == Positions::Learned)
                .then(|| table("positions", config.max_time + usize::from(class_token))),
            sinusoids: Sinusoids::new(dim),
            types: (config.token_types > 0).then(|| table("types", config.token_types)),
            norm: config
                .embed_norm
                .then(|| Norm::sized(config, dim, "embed_norm", builder)),
            proj: (config.embed_dim > 0)
                .then(|| Linear::new(builder, "embed_proj", dim, config.dim, true)),
        }
    }

    /// The vectors of the vocabulary, `[vocab, embed_dim]`, where tokens are read.
    pub(crate) fn weight(&self) -> Option<&Param> {
        match &self.source {
            Source::Tokens { weight, .. } => Some(weight),
            Source::Patches { .. } => None,
        }
    }

    pub(crate) fn tokens(&self, ids: &[u32], batch: usize) -> Result<Tensor<3>, ModelError> {
        let Source::Tokens { weight, vocab } = &self.source else {
            return Err(ModelError::Input(
                "expected pictures (the model reads patches), got tokens".into(),
            ));
        };
        if batch == 0 || !ids.len().is_multiple_of(batch) {
            return Err(ModelError::Input(format!(
                "{} token ids do not fill {batch} rows",
                ids.len()
            )));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= *vocab) {
            return Err(ModelError::Input(format!(
                "token id {id} is not below the vocabulary of {vocab}"
            )));
        }
        let time = ids.len() / batch;
        let ids = Arc::new(ids.to_vec());
        Ok(embedding_of(weight, ids, [batch, time]))
    }

    pub(crate) fn pixels(
        &self,
        values: &[f32],
        batch: usize,
        device: &Device,
    ) -> Result<Tensor<3>, ModelError> {
        let Source::Patches { proj, reads } = &self.source else {
            return Err(ModelError::Input(
                "expected tokens (the model has a vocabulary), got pictures".into(),
            ));
        };
        let [height, width, channels, patch] = *reads;
        if values.len() != batch * height * width * channels {
            return Err(ModelError::Input(format!(
                "expected {batch} pictures of {height} x {width} x {channels}, got {} values",
                values.len()
            )));
        }
        let (rows, columns) = (height / patch, width / patch);
        let x = Tensor::<1>::from_data(values, device)
            .reshape([batch, rows, patch, columns, patch * channels])
            .permute([0, 1, 3, 2, 4])
            .reshape([batch, rows * columns, patch * patch * channels]);
        Ok(proj.forward(x))
    }

    /// Adds positions and types (0 for every token where none are given), applies the norm, and goes to the blocks' width.
    pub(crate) fn finish(
        &self,
        x: Tensor<3>,
        types: Option<&[u32]>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<Tensor<3>, ModelError> {
        let mut x = self.add_positions(x, context, state)?;
        x = self.add_types(x, types)?;
        if let Some(norm) = &self.norm {
            x = norm.forward(x);
        }
        Ok(match &self.proj {
            Some(proj) => proj.forward(x),
            None => x,
        })
    }

    fn add_positions(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<Tensor<3>, ModelError> {
        let [batch, time, dim] = x.dims();
        let positions = match self.fixed {
            Positions::None => return Ok(x),
            _ => context.positions(batch, time, state),
        };
        let Some(table) = &self.positions else {
            let rows = self.sinusoids.rows(&positions);
            let rows = Tensor::<1>::from_data(rows.as_slice(), &x.device());
            return Ok(x + rows.reshape([batch, time, dim]));
        };
        let rows = table.shape()[0];
        if let Some(far) = positions.iter().find(|position| **position >= rows) {
            return Err(ModelError::Input(format!(
                "position {far} is beyond the {rows} learned positions; raise max_time"
            )));
        }
        let ids = positions.iter().map(|position| *position as u32).collect();
        Ok(x + embedding(table.tensor::<2>(), Arc::new(ids), [batch, time]))
    }

    fn add_types(&self, x: Tensor<3>, types: Option<&[u32]>) -> Result<Tensor<3>, ModelError> {
        let [batch, time, _] = x.dims();
        let Some(table) = &self.types else {
            return match types {
                None => Ok(x),
                Some(_) => Err(ModelError::Input("the model has no token types".into())),
            };
        };
        let types = types.map_or_else(|| vec![0; batch * time], <[u32]>::to_vec);
        let known = table.shape()[0];
        if types.len() != batch * time || types.iter().any(|kind| *kind as usize >= known) {
            return Err(ModelError::Input(format!(
                "expected {} token types below {known}, got {}",
                batch * time,
                types.len()
            )));
        }
        Ok(x + embedding(table.tensor::<2>(), Arc::new(types), [batch, time]))
    }

    /// Parameters, and operations over `time` tokens.
    pub(crate) fn cost(&self, time: usize) -> Cost {
        let (mut params, mut flops) = match &self.source {
            Source::Tokens { weight, .. } => (weight.count(), 0),
            Source::Patches { proj, .. } => (
                proj.weight.count() + proj.weight.shape()[0],
                proj.flops(time),
            ),
        };
        params += self.positions.as_ref().map_or(0, Param::count);
        params += self.types.as_ref().map_or(0, Param::count);
        params += self.norm.as_ref().map_or(0, Norm::count);
        if let Some(proj) = &self.proj {
            params += proj.weight.count() + proj.weight.shape()[0];
            flops += proj.flops(time);
        }
        Cost {
            params: params as u64,
            flops,
            state_bytes: 0,
        }
    }
}
