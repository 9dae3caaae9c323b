//! A model: embedding, blocks, head.

use std::sync::Arc;

use anyformer_mixers::{Context, Cost, State};
use anyformer_ops::loss::cross_entropy;
use anyformer_ops::workers::on_worker;
use anyformer_ops::{Builder, Device, LinearInit, ParamStore, Tensor, device_is_cpu};

use crate::block::{Block, Norm};
use crate::config::{ModelConfig, ModelError, Pool, Precision, Wiring};
use crate::embed::Embed;
use crate::head::Head;
use crate::input::{Input, pack};
use crate::rows::{gather_rows, places, pooled};

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

/// A built model; see [`ModelConfig`] for what it can be.
pub struct Model {
    config: ModelConfig,
    store: ParamStore,
    embed: Embed,
    blocks: Vec<Block>,
    norm: Option<Norm>,
    head: Head,
}

impl Model {
    /// Builds a model on `device`; give an autodiff device to train it. Equal seeds give equal parameters.
    pub fn new(config: &ModelConfig, device: &Device, seed: u64) -> Result<Self, ModelError> {
        Self::build(config, Builder::new(device, seed))
    }

    /// A model whose values are all 0, to be set from a file.
    pub fn unfilled(config: &ModelConfig, device: &Device) -> Result<Self, ModelError> {
        Self::build(config, Builder::unfilled(device))
    }

    /// A model without values: its parameters can be counted and its cost asked, nothing can be run.
    pub fn shapes(config: &ModelConfig) -> Result<Self, ModelError> {
        Self::build(config, Builder::shapes_only())
    }

    fn build(config: &ModelConfig, builder: Builder) -> Result<Self, ModelError> {
        config.check()?;
        if config.precision == Precision::Bf16
            && builder
                .device()
                .is_some_and(|device| !device_is_cpu(device))
        {
            return Err(ModelError::Impossible(
                "precision bf16 is of the CPU's products; on this device set precision = \"f32\""
                    .into(),
            ));
        }
        let mut builder = builder.with_precision(config.precision.into());
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
        let embed = Embed::new(config, &builder);
        let own = if config.share_layers {
            1
        } else {
            config.layers
        };
        let blocks = (0..own)
            .map(|layer| Block::new(config, layer, &inner.at("layers").at(layer)))
            .collect::<Result<Vec<_>, _>>()?;
        let norm = (config.wiring != Wiring::PostNorm).then(|| Norm::new(config, "norm", &builder));
        let head = Head::new(config, embed.weight(), &builder)?;
        Ok(Model {
            config: config.clone(),
            store: builder.store(),
            embed,
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
        let read = time;
        let time = match &self.head {
            Head::Classes(head) => time + head.extra(),
            _ => time,
        };
        let mut cost = Cost::default();
        for layer in 0..self.config.layers {
            let mut own = self.block(layer).cost(time);
            if layer >= self.blocks.len() {
                own.params = 0;
            }
            cost = cost + own;
        }
        let norms: usize = self.blocks.iter().map(Block::norm_params).sum();
        cost.params += (norms + self.norm.as_ref().map_or(0, Norm::count)) as u64;
        let cost = cost + self.embed.cost(read);
        self.head.cost(cost, time)
    }

    /// The block of a layer; where layers share their weights there is one.
    fn block(&self, layer: usize) -> &Block {
        &self.blocks[layer % self.blocks.len()]
    }

    /// Hidden vectors after the last norm: `[batch, time, dim]`, or `[1, total, dim]` when packed.
    fn hidden(
        &self,
        x: Tensor<3>,
        types: Option<&[u32]>,
        context: &Context,
        state: Option<&ModelState>,
    ) -> Result<(Tensor<3>, Option<ModelState>), ModelError> {
        let [batch, time, _] = x.dims();
        let times = state.map(|state| State::new(state.times.clone()));
        let mut x = self.embed.finish(x, types, context, times.as_ref())?;
        let mut states = Vec::new();
        for index in 0..self.config.layers {
            let held = state.map(|state| &state.layers[index]);
            let (y, next) = self.block(index).forward(x, context, held)?;
            x = y;
            states.extend(next);
        }
        if let Some(norm) = &self.norm {
            x = norm.forward(x);
        }
        let next = (context.keep_state && states.len() == self.config.layers).then(|| ModelState {
            times: context.times_after(batch, time, times.as_ref()),
            layers: states,
        });
        Ok((x, next))
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
        let (ids, types, batch) = match input {
            Input::Tokens { ids, batch } => (ids, None, batch),
            Input::TypedTokens { ids, types, batch } => (ids, Some(types), batch),
            Input::Pixels { values, batch } => {
                if lengths.is_some() {
                    return Err(ModelError::Input("pictures have no lengths".into()));
                }
                let x = self.embed.pixels(values, batch, &self.store.device())?;
                return self.run(x, None, context);
            }
        };
        let Some(lengths) = lengths else {
            let x = self.embed.tokens(ids, batch)?;
            return self.run(x, types, context);
        };
        let packed = pack(ids, batch, lengths)?;
        let types = types.map(|types| pack(types, batch, lengths)).transpose()?;
        context.offsets = Some(packed.offsets);
        let x = self.embed.tokens(&packed.ids, 1)?;
        self.run(x, types.as_ref().map(|packed| &packed.ids[..]), context)
    }

    fn run(
        &self,
        x: Tensor<3>,
        types: Option<&[u32]>,
        mut context: Context,
    ) -> Result<(Tensor<3>, Arc<Vec<usize>>), ModelError> {
        let x = match &self.head {
            Head::Classes(head) if head.extra() > 0 && types.is_some() => {
                return Err(ModelError::Input(
                    "token types have none for a class token; pool = \"first\" reads the first token".into(),
                ));
            }
            Head::Classes(head) => head.put_class_token(x, &mut context),
            _ => x,
        };
        let [batch, time, _] = x.dims();
        let offsets = context.sequences(batch, time);
        Ok((self.hidden(x, types, &context, None)?.0, offsets))
    }

    /// Scores: `[valid tokens, vocab]` of a model that gives tokens, `[batch, classes]` of one that gives a class
    /// (`[batch / 2, classes]` where it reads pairs, rows 2 i and 2 i + 1 being one); of one
    /// without a head the hidden vectors `[valid tokens, dim]`.
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
        Ok(self.head.scores(rows))
    }

    /// Pooled hidden vectors `[rows, dim]` of sequences of unequal length, packed: what an encoder makes of each.
    pub fn vectors(&self, rows: &[&[u32]], pool: Pool) -> Result<Tensor<2>, ModelError> {
        if rows.is_empty() || rows.iter().any(|row| row.is_empty()) {
            return Err(ModelError::Input("a sequence without tokens".into()));
        }
        let lengths: Vec<usize> = rows.iter().map(|row| row.len()).collect();
        let (batch, longest) = (rows.len(), lengths.iter().copied().max().unwrap_or(0));
        let mut ids = vec![0; batch * longest];
        for (padded, row) in ids.chunks_mut(longest).zip(rows) {
            padded[..row.len()].copy_from_slice(row);
        }
        let (x, offsets) = self.encode(Input::Tokens { ids: &ids, batch }, Some(&lengths))?;
        Ok(pooled(x, &offsets, pool))
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
            (Head::Tied(_) | Head::Tokens(_) | Head::Masked { .. }, Target::Tokens(tokens)) => {
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
        let scores = self.head.scores(rows);
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
        on_worker(|| self.read(ids, batch, lengths, state))
    }

    fn read(
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
            None => self.embed.tokens(ids, batch)?,
            Some(lengths) => {
                let packed = pack(ids, batch, lengths)?;
                context.offsets = Some(packed.offsets);
                self.embed.tokens(&packed.ids, 1)?
            }
        };
        let [rows, time, _] = x.dims();
        let offsets = context.sequences(rows, time);
        let (x, next) = self.hidden(x, None, &context, state)?;
        let Some(next) = next else {
            panic!("a mixer whose card says that it streams gave no state")
        };
        let last = pooled(x, &offsets, Pool::Last);
        Ok((self.head.scores(last), next))
    }

    /// Reads `ids` as one sequence, going on from `state`, and returns the scores after every token `[tokens, vocab]` with the
    /// state after the last.
    pub fn scores_of_each(
        &self,
        ids: &[u32],
        state: &ModelState,
    ) -> Result<(Tensor<2>, ModelState), ModelError> {
        let x = self.embed.tokens(ids, 1)?;
        let (x, next) = self.hidden(x, None, &Context::with_state(), Some(state))?;
        let Some(next) = next else {
            return Err(ModelError::Input("the model carries no state".into()));
        };
        let rows = x.reshape([ids.len(), self.config.dim]);
        Ok((self.head.scores(rows), next))
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
