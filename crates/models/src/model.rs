//! A model: embedding, blocks, head.

use std::sync::Arc;

use anyformer_mixers::{Context, Cost, State};
use anyformer_ops::embedding::embedding;
use anyformer_ops::loss::cross_entropy;
use anyformer_ops::{Builder, Device, Init, Linear, LinearInit, Param, ParamStore, Tensor, meter};

use crate::block::{Block, Norm};
use crate::config::{Gives, ModelConfig, ModelError, Pool, Positions, Reads, Wiring};
use crate::head::{ClassHead, pooled};
use crate::input::{Input, pack};
use crate::rows::{gather_rows, places, sinusoids};

/// What a model carries from one call to the next: one state per layer.
#[derive(Clone, Debug)]
pub struct ModelState {
    /// Tokens consumed, per sequence.
    pub times: Vec<usize>,
    /// The layers' states, first layer first.
    pub layers: Vec<State>,
}

impl ModelState {
    /// Size in bytes, all sequences together.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(State::bytes).sum()
    }
}

/// What a batch should have given.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// The next token at every position `[batch * time]`, negative where none is scored.
    Tokens(&'a [i64]),
    /// The class of every row.
    Classes(&'a [i64]),
}

/// A loss with what was counted on the way.
pub struct Scored {
    /// Mean cross entropy in nats over the scored places, shape `[1]`.
    pub loss: Tensor<1>,
    /// Places where the highest score was the right one.
    pub correct: usize,
    /// Scored places.
    pub counted: usize,
}

enum Embed {
    Tokens { weight: Param, vocab: usize },
    Patches { proj: Linear, reads: [usize; 4] },
}

enum Head {
    Tied,
    Tokens(Linear),
    Classes(ClassHead),
}

/// A built model; see [`ModelConfig`] for what it can be.
pub struct Model {
    config: ModelConfig,
    store: ParamStore,
    embed: Embed,
    positions: Option<Param>,
    blocks: Vec<Block>,
    norm: Option<Norm>,
    head: Head,
}

impl Model {
    /// Builds a model on `device`; give an autodiff device to train it. Equal seeds give equal parameters.
    pub fn new(config: &ModelConfig, device: &Device, seed: u64) -> Result<Self, ModelError> {
        Self::build(config, Builder::new(device, seed))
    }

    /// A model without values: its parameters can be counted and its cost asked, nothing can be run.
    pub fn shapes(config: &ModelConfig) -> Result<Self, ModelError> {
        Self::build(config, Builder::shapes_only())
    }

    fn build(config: &ModelConfig, builder: Builder) -> Result<Self, ModelError> {
        config.check()?;
        let mut builder = builder;
        if let Some(deviation) = config.initializer_range {
            builder = builder.with_linear_init(LinearInit::Normal(deviation));
        }
        let branches = if config.channel.name == "none" { 1 } else { 2 };
        let inner = match config.scale_residual {
            true => {
                let scale = 1.0 / ((branches * config.layers) as f32).sqrt();
                builder.clone().with_residual_scale(scale)
            }
            false => builder.clone(),
        };
        let embed = match config.reads {
            Reads::Tokens { vocab } => Embed::Tokens {
                weight: builder.at("embed").param(
                    "weight",
                    &[vocab, config.dim],
                    Init::Normal(0.02),
                ),
                vocab,
            },
            Reads::Patches {
                height,
                width,
                channels,
                patch,
            } => Embed::Patches {
                proj: Linear::new(
                    &builder,
                    "embed",
                    patch * patch * channels,
                    config.dim,
                    true,
                ),
                reads: [height, width, channels, patch],
            },
        };
        let class_token = matches!(
            config.gives,
            Gives::Class {
                pool: Pool::Cls,
                ..
            }
        );
        let positions = (config.positions == Positions::Learned).then(|| {
            builder.at("positions").param_no_decay(
                "weight",
                &[config.max_time + usize::from(class_token), config.dim],
                Init::Normal(0.02),
            )
        });
        let blocks = (0..config.layers)
            .map(|layer| Block::new(config, layer, &inner.at("layers").at(layer)))
            .collect::<Result<Vec<_>, _>>()?;
        let norm = (config.wiring == Wiring::PreNorm).then(|| Norm::new(config, "norm", &builder));
        let head = match (config.gives, config.reads) {
            (Gives::NextToken { tied: true }, _) => Head::Tied,
            (Gives::NextToken { tied: false }, Reads::Tokens { vocab }) => {
                Head::Tokens(Linear::new(&builder, "lm_head", config.dim, vocab, false))
            }
            (Gives::NextToken { .. }, Reads::Patches { .. }) => {
                return Err(ModelError::Impossible("patches give a class".into()));
            }
            (Gives::Class { .. }, _) => Head::Classes(ClassHead::new(config, &builder)),
        };
        Ok(Model {
            config: config.clone(),
            store: builder.store(),
            embed,
            positions,
            blocks,
            norm,
            head,
        })
    }

    /// The config it was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its parameters and buffers.
    pub fn params(&self) -> &ParamStore {
        &self.store
    }

    /// Exact cost of one sequence of `time` tokens, embedding and head included; of a model that reads pairs, the
    /// operations of a pair of such sequences.
    pub fn cost(&self, time: usize) -> Cost {
        let time = match &self.head {
            Head::Classes(head) => time + head.extra(),
            _ => time,
        };
        let blocks = self.blocks.iter().map(|block| block.cost(time));
        let mut cost = blocks.fold(Cost::default(), |a, b| a + b);
        let norms: usize = self.blocks.iter().map(Block::norm_params).sum();
        cost.params += norms as u64;
        cost.params += match &self.embed {
            Embed::Tokens { weight, .. } => weight.count() as u64,
            Embed::Patches { proj, .. } => {
                cost.flops += proj.flops(time);
                (proj.weight.count() + self.config.dim) as u64
            }
        };
        cost.params += self.positions.as_ref().map_or(0, Param::count) as u64;
        if self.norm.is_some() {
            let per = match self.config.norm {
                crate::config::NormKind::Rms => 1,
                crate::config::NormKind::Layer => 2,
            };
            cost.params += (per * self.config.dim) as u64;
        }
        match (&self.head, &self.embed) {
            (Head::Tied, Embed::Tokens { weight, .. }) => {
                cost.flops += 2 * (time * weight.count()) as u64;
            }
            (Head::Tied, Embed::Patches { .. }) => {}
            (Head::Tokens(linear), _) => {
                cost.params += linear.weight.count() as u64;
                cost.flops += linear.flops(time);
            }
            (Head::Classes(head), _) => cost = head.cost(cost),
        }
        cost
    }

    /// Hidden vectors after the last norm: `[batch, time, dim]`, or `[1, total, dim]` when packed.
    fn hidden(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&ModelState>,
    ) -> Result<(Tensor<3>, Option<ModelState>), ModelError> {
        let [batch, time, _] = x.dims();
        let times = state.map(|state| State::new(state.times.clone()));
        let mut x = self.add_positions(x, context, times.as_ref())?;
        let mut states = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let held = state.map(|state| &state.layers[index]);
            let (y, next) = block.forward(x, context, held)?;
            x = y;
            states.extend(next);
        }
        if let Some(norm) = &self.norm {
            x = norm.forward(x);
        }
        let next = (context.keep_state && states.len() == self.blocks.len()).then(|| ModelState {
            times: context.times_after(batch, time, times.as_ref()),
            layers: states,
        });
        Ok((x, next))
    }

    fn add_positions(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&State>,
    ) -> Result<Tensor<3>, ModelError> {
        let [batch, time, dim] = x.dims();
        let positions = match self.config.positions {
            Positions::None => return Ok(x),
            _ => context.positions(batch, time, state),
        };
        let table = match &self.positions {
            Some(table) => {
                let rows = table.shape()[0];
                if let Some(far) = positions.iter().find(|position| **position >= rows) {
                    return Err(ModelError::Input(format!(
                        "position {far} is beyond the {rows} learned positions; raise max_time"
                    )));
                }
                table.tensor::<2>()
            }
            None => {
                let rows = positions.iter().max().map_or(0, |last| last + 1);
                sinusoids(rows, dim, &x.device())
            }
        };
        let ids = positions.iter().map(|position| *position as u32).collect();
        Ok(x + embedding(table, Arc::new(ids), [batch, time]))
    }

    fn embed_tokens(&self, ids: &[u32], batch: usize) -> Result<Tensor<3>, ModelError> {
        let Embed::Tokens { weight, vocab } = &self.embed else {
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
        Ok(embedding(
            weight.tensor::<2>(),
            Arc::new(ids.to_vec()),
            [batch, time],
        ))
    }

    fn embed_pixels(&self, values: &[f32], batch: usize) -> Result<Tensor<3>, ModelError> {
        let Embed::Patches { proj, reads } = &self.embed else {
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
        let x = Tensor::<1>::from_data(values, &self.store.device())
            .reshape([batch, rows, patch, columns, patch * channels])
            .permute([0, 1, 3, 2, 4])
            .reshape([batch, rows * columns, patch * patch * channels]);
        Ok(proj.forward(x))
    }

    /// Runs over whole sequences. Padded rows (valid up to `lengths`) are packed first: nothing reads padding, and the
    /// hidden vectors then come as `[1, sum of lengths, dim]`. Also returns the cumulative lengths.
    fn encode(
        &self,
        input: Input,
        lengths: Option<&[usize]>,
    ) -> Result<(Tensor<3>, Arc<Vec<usize>>), ModelError> {
        let mut context = Context {
            grid: self.config.grid(),
            ..Context::default()
        };
        let x = match (input, lengths) {
            (Input::Tokens { ids, batch }, None) => self.embed_tokens(ids, batch)?,
            (Input::Tokens { ids, batch }, Some(lengths)) => {
                let packed = pack(ids, batch, lengths)?;
                context.offsets = Some(packed.offsets);
                self.embed_tokens(&packed.ids, 1)?
            }
            (Input::Pixels { values, batch }, None) => self.embed_pixels(values, batch)?,
            (Input::Pixels { .. }, Some(_)) => {
                return Err(ModelError::Input("pictures have no lengths".into()));
            }
        };
        let x = match &self.head {
            Head::Classes(head) => head.put_class_token(x, &mut context),
            _ => x,
        };
        let [batch, time, _] = x.dims();
        let offsets = context.sequences(batch, time);
        let (x, _) = self.hidden(x, &context, None)?;
        Ok((x, offsets))
    }

    /// Scores of hidden rows `[rows, dim]`.
    fn scores(&self, rows: Tensor<2>) -> Tensor<2> {
        match (&self.head, &self.embed) {
            (Head::Tokens(linear), _) => linear.forward(rows),
            (Head::Classes(head), _) => head.scores(rows),
            (Head::Tied, Embed::Tokens { weight, .. }) => {
                meter::add(2 * (rows.dims()[0] * weight.count()) as u64);
                rows.matmul(weight.tensor::<2>().transpose())
            }
            (Head::Tied, Embed::Patches { .. }) => panic!("checked when built"),
        }
    }

    /// Scores: `[valid tokens, vocab]` of a model that gives tokens, `[batch, classes]` of one that gives a class
    /// (`[batch / 2, classes]` where it reads pairs, rows 2 i and 2 i + 1 being one).
    pub fn forward(
        &self,
        input: Input,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor<2>, ModelError> {
        let (x, offsets) = self.encode(input, lengths)?;
        let rows = match &self.head {
            Head::Classes(head) => head.features(x, &offsets)?,
            _ => {
                let total = x.dims()[0] * x.dims()[1];
                x.reshape([total, self.config.dim])
            }
        };
        Ok(self.scores(rows))
    }

    /// The loss of a batch. Only scored places are projected onto the vocabulary.
    pub fn loss(
        &self,
        input: Input,
        lengths: Option<&[usize]>,
        target: Target,
    ) -> Result<Scored, ModelError> {
        let (x, offsets) = self.encode(input, lengths)?;
        let (rows, wanted) = match (&self.head, target) {
            (Head::Classes(head), Target::Classes(classes)) => {
                let rows = head.features(x, &offsets)?;
                if classes.len() != rows.dims()[0] {
                    return Err(ModelError::Input(format!(
                        "expected {} classes, got {}",
                        rows.dims()[0],
                        classes.len()
                    )));
                }
                (rows, classes.to_vec())
            }
            (Head::Tied | Head::Tokens(_), Target::Tokens(tokens)) => {
                let places = places(tokens, &offsets, lengths.is_some())?;
                let total = x.dims()[0] * x.dims()[1];
                let flat = x.reshape([total, self.config.dim]);
                let (ids, wanted): (Vec<u32>, Vec<i64>) = places.into_iter().unzip();
                let rows = match ids.len() == total {
                    true => flat,
                    false => gather_rows(flat, ids),
                };
                (rows, wanted)
            }
            _ => {
                return Err(ModelError::Input(
                    "the targets do not fit the head: tokens for a language model, classes for a classifier".into(),
                ));
            }
        };
        let scores = self.scores(rows);
        let classes = scores.dims()[1];
        if let Some(wrong) = wanted.iter().find(|wanted| **wanted >= classes as i64) {
            return Err(ModelError::Input(format!(
                "target {wrong} is not below the {classes} scores"
            )));
        }
        let scored = cross_entropy(scores, Arc::new(wanted));
        Ok(Scored {
            loss: scored.loss,
            correct: scored.correct,
            counted: scored.counted,
        })
    }

    /// Reads `ids` (`[batch, time]`, or padded rows with `lengths`), going on from `state`, and returns the scores after
    /// each sequence's last token `[sequences, vocab]` with the state there.
    pub fn prefill(
        &self,
        ids: &[u32],
        batch: usize,
        lengths: Option<&[usize]>,
        state: Option<&ModelState>,
    ) -> Result<(Tensor<2>, ModelState), ModelError> {
        if let Some(state) = state
            && state.times.len() != batch
        {
            return Err(ModelError::Input(format!(
                "the state holds {} sequences, the input {batch}",
                state.times.len()
            )));
        }
        if !self.config.streams() {
            let names: Vec<&str> = self
                .config
                .mixers
                .iter()
                .map(|spec| spec.name.as_str())
                .collect();
            return Err(ModelError::Input(format!(
                "a mixer of {names:?} cannot stream in this config, so there is no state to go on from; see its card"
            )));
        }
        let mut context = Context::with_state();
        let x = match lengths {
            None => self.embed_tokens(ids, batch)?,
            Some(lengths) => {
                let packed = pack(ids, batch, lengths)?;
                context.offsets = Some(packed.offsets);
                self.embed_tokens(&packed.ids, 1)?
            }
        };
        let [rows, time, _] = x.dims();
        let offsets = context.sequences(rows, time);
        let (x, next) = self.hidden(x, &context, state)?;
        let Some(next) = next else {
            panic!("a mixer whose card says that it streams gave no state")
        };
        let last = pooled(x, &offsets, Pool::Last);
        Ok((self.scores(last), next))
    }

    /// One more token for each sequence.
    pub fn step(
        &self,
        ids: &[u32],
        state: &ModelState,
    ) -> Result<(Tensor<2>, ModelState), ModelError> {
        self.prefill(ids, ids.len(), None, Some(state))
    }
}
