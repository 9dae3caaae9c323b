//! A model: embedding, blocks, head.

use std::sync::Arc;

use anyformer_mixers::{Context, Cost, Losses, State, Training};
use anyformer_ops::dropout::{Dropout, Key};
use anyformer_ops::lengths::cumulative;
use anyformer_ops::loss::{cross_entropy, distance};
use anyformer_ops::workers::on_worker;
use anyformer_ops::{Builder, Device, LinearInit, ParamStore, Tensor, device_is_cpu};

use crate::block::{Block, Norm};
use crate::config::{ModelConfig, ModelError, Pool, Precision, Wiring};
use crate::depth::{Depth, Passed};
use crate::embed::Embed;
use crate::exits::{Exit, Watch, confidence};
use crate::first_conv::FirstConv;
use crate::head::Head;
use crate::input::{Input, pack};
use crate::rows::pooled;
use crate::state::ModelState;

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
    /// Mean cross entropy in nats over the scored places, shape `[1]`; with a teacher, mixed with the distance to it.
    pub loss: Tensor<1>,
    /// What mixers and exits want added to it in training: the balance of experts, the exits' own losses.
    pub extra: Option<Tensor<1>>,
    /// Places where the highest score was the right one.
    pub correct: usize,
    /// Scored places.
    pub counted: usize,
}

/// What one pass of training does beside the plain one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass<'a> {
    /// Layers that are left out, where true; empty: none.
    pub skip: &'a [bool],
    /// Whether only what goes into each block is kept for the backward pass, which runs the blocks again.
    pub recompute: bool,
    /// Another model's scores of the same places.
    pub teacher: Option<Teacher<'a>>,
    /// Which pass of a run it is, for what is drawn or moved in training (dropout, the matrix of Performer, the directions of
    /// Routing); none: nothing, as in evaluation.
    pub training: Option<Training>,
}

/// A teacher's part in the loss, Hinton et al. (2015), arXiv 1503.02531:
/// `(1 - mix) cross entropy + mix T² KL(softmax(teacher / T) || softmax(student / T))`.
#[derive(Clone, Copy, Debug)]
pub struct Teacher<'a> {
    /// `[places, scores]`, row by row, from [`Model::answers`].
    pub scores: &'a [f32],
    /// T.
    pub temperature: f64,
    /// From 0, the plain loss, to 1.
    pub mix: f64,
}

impl Teacher<'_> {
    fn distance(&self, scores: &Tensor<2>) -> Result<Tensor<1>, ModelError> {
        let [rows, classes] = scores.dims();
        if self.scores.len() != rows * classes {
            return Err(ModelError::Input(format!(
                "the teacher gave {} scores, the model gives {rows} x {classes}; both must give the same",
                self.scores.len()
            )));
        }
        Ok(distance(scores.clone(), self.scores, self.temperature))
    }
}

/// A built model; see [`ModelConfig`] for what it can be.
pub struct Model {
    config: ModelConfig,
    store: ParamStore,
    pub(crate) embed: Embed,
    /// Those with weights of their own; layer `i` is block `i % blocks.len()`.
    blocks: Vec<Arc<Block>>,
    first_conv: Option<FirstConv>,
    exits: Vec<Exit>,
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
        let blocks = (0..config.unique_layers())
            .map(|layer| Block::new(config, layer, &inner.at("layers").at(layer)).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let norm = (config.wiring != Wiring::PostNorm).then(|| Norm::new(config, "norm", &builder));
        let first_conv = FirstConv::new(config, &builder);
        let exits = Exit::all(config, embed.weight(), &builder)?;
        let head = Head::new(config, embed.weight(), false, &builder)?;
        Ok(Model {
            config: config.clone(),
            store: builder.store(),
            embed,
            blocks,
            first_conv,
            exits,
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

    /// Exact cost of one sequence of `time` tokens, embedding and head included, exits not taken; of a model that reads pairs, the
    /// operations of a pair of such sequences.
    pub fn cost(&self, time: usize) -> Cost {
        let read = time;
        let time = match &self.head {
            Head::Classes(head) => time + head.extra(),
            _ => time,
        };
        let mut cost = Cost::default();
        for (index, block) in self.blocks.iter().enumerate() {
            // A shared block runs in several layers.
            let runs = (self.config.layers - index).div_ceil(self.blocks.len()) as u64;
            let own = block.cost(time);
            cost.params += own.params;
            cost.flops += own.flops.saturating_mul(runs);
            cost.state_bytes += own.state_bytes.saturating_mul(runs);
        }
        let norms: usize = self.blocks.iter().map(|block| block.norm_params()).sum();
        cost.params += (norms + self.norm.as_ref().map_or(0, Norm::count)) as u64;
        cost.params += self.exits.iter().map(Exit::params).sum::<u64>();
        let conv = self.first_conv.as_ref().map(|conv| conv.cost(time));
        let cost = cost + self.embed.cost(read) + conv.unwrap_or_default();
        self.head.cost(cost, time)
    }

    /// Hidden vectors after the last norm: `[batch, time, dim]`, or `[1, total, dim]` when packed.
    fn hidden(
        &self,
        x: Tensor<3>,
        types: Option<&[u32]>,
        context: &Context,
        state: Option<&ModelState>,
        watch: &mut Watch,
    ) -> Result<(Tensor<3>, Option<ModelState>), ModelError> {
        let [batch, time, _] = x.dims();
        let times = state.map(|state| State::new(state.times.clone()));
        let x = self.embed.finish(x, types, context, times.as_ref())?;
        let depth = Depth {
            config: &self.config,
            blocks: &self.blocks,
            first_conv: self.first_conv.as_ref(),
            exits: &self.exits,
        };
        let x = context.dropped(0, x);
        let Passed {
            mut stream,
            states,
            left,
        } = depth.run(x, context, state, watch)?;
        if left {
            return Ok((stream.sum(), None));
        }
        let x = match &self.norm {
            Some(norm) => stream.normed(norm),
            None => stream.sum(),
        };
        let layers = self.config.layers;
        let next = (context.keep_state && states.len() == layers).then(|| ModelState {
            times: context.times_after(batch, time, times.as_ref()),
            layers: states,
        });
        Ok((x, next))
    }

    /// Runs over whole sequences. Padded rows (valid up to `lengths`) are packed first: nothing reads padding, and the
    /// hidden vectors then come as `[1, sum of lengths, dim]`. Also returns the cumulative lengths.
    pub(crate) fn encode(
        &self,
        input: Input,
        lengths: Option<&[usize]>,
        mut context: Context,
        watch: &mut Watch,
    ) -> Result<(Tensor<3>, Arc<Vec<usize>>), ModelError> {
        context.grid = self.config.grid();
        let (ids, types, batch) = match input {
            Input::Tokens { ids, batch } => (ids, None, batch),
            Input::TypedTokens { ids, types, batch } => (ids, Some(types), batch),
            Input::Pixels { values, batch } => {
                if lengths.is_some() {
                    return Err(ModelError::Input("pictures have no lengths".into()));
                }
                let x = self.embed.pixels(values, batch, &self.store.device())?;
                return self.run(x, None, context, watch);
            }
        };
        let Some(lengths) = lengths else {
            let x = self.embed.tokens(ids, batch)?;
            return self.run(x, types, context, watch);
        };
        let packed = pack(ids, batch, lengths)?;
        let types = types.map(|types| pack(types, batch, lengths)).transpose()?;
        context.offsets = Some(packed.offsets);
        let x = self.embed.tokens(&packed.ids, 1)?;
        let types = types.as_ref().map(|packed| &packed.ids[..]);
        self.run(x, types, context, watch)
    }

    fn run(
        &self,
        x: Tensor<3>,
        types: Option<&[u32]>,
        mut context: Context,
        watch: &mut Watch,
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
        Ok((self.hidden(x, types, &context, None, watch)?.0, offsets))
    }

    /// Scores: `[valid tokens, vocab]` of a model that gives tokens, `[batch, classes]` of one that gives a class
    /// (`[batch / 2, classes]` where it reads pairs, rows 2 i and 2 i + 1 being one); of one
    /// without a head the hidden vectors `[valid tokens, dim]`.
    pub fn forward(
        &self,
        input: Input,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor<2>, ModelError> {
        let watch = &mut Watch::default();
        let (x, offsets) = self.encode(input, lengths, self.context(), watch)?;
        self.head.all_scores(x, &offsets)
    }

    /// The loss of a batch. Only scored places are projected onto the vocabulary.
    pub fn loss(
        &self,
        input: Input,
        lengths: Option<&[usize]>,
        target: Target,
    ) -> Result<Scored, ModelError> {
        self.loss_with(input, lengths, target, &Pass::default())
    }

    /// What mixers are told in a pass that nothing is special about.
    pub(crate) fn context(&self) -> Context {
        Context {
            precision: self.config.precision.into(),
            ..Context::default()
        }
    }

    /// The same with what a pass of training adds to it.
    pub fn loss_with(
        &self,
        input: Input,
        lengths: Option<&[usize]>,
        target: Target,
        pass: &Pass,
    ) -> Result<Scored, ModelError> {
        let losses = Losses::default();
        let context = Context {
            losses: Some(losses.clone()),
            training: pass.training,
            dropout: pass.training.map(|training| Dropout {
                key: Key::new(training.seed, training.nth),
                chance: self.config.dropout as f32,
            }),
            ..self.context()
        };
        let mut at_exits = Vec::new();
        let mut keep = |exit: &Exit, x: &Tensor<3>, _: &[usize]| -> Result<bool, ModelError> {
            at_exits.push((exit.after, exit.norm(x.clone())));
            Ok(false)
        };
        let mut watch = Watch {
            skip: pass.skip,
            recompute: pass.recompute,
            leave: Some(&mut keep),
        };
        let (x, offsets) = self.encode(input, lengths, context, &mut watch)?;
        let packed = lengths.is_some();
        for exit in &self.exits {
            for (_, x) in at_exits.iter().filter(|(after, _)| *after == exit.after) {
                let (scores, wanted) = exit.head.scored(x.clone(), &offsets, packed, target)?;
                losses.add(cross_entropy(scores, Arc::new(wanted)).loss);
            }
        }
        let (scores, wanted) = self.head.scored(x, &offsets, packed, target)?;
        let taught = match &pass.teacher {
            Some(teacher) if teacher.mix > 0.0 => Some((teacher.distance(&scores)?, teacher.mix)),
            _ => None,
        };
        let scored = cross_entropy(scores, Arc::new(wanted));
        Ok(Scored {
            loss: match taught {
                Some((distance, mix)) => scored.loss * (1.0 - mix) + distance * mix,
                None => scored.loss,
            },
            extra: losses.sum(),
            correct: scored.correct,
            counted: scored.counted,
        })
    }

    /// The scores of the places that [`Model::loss`] scores, `[places, scores]`.
    pub fn answers(
        &self,
        input: Input,
        lengths: Option<&[usize]>,
        target: Target,
    ) -> Result<Tensor<2>, ModelError> {
        let watch = &mut Watch::default();
        let (x, offsets) = self.encode(input, lengths, self.context(), watch)?;
        let packed = lengths.is_some();
        Ok(self.head.scored(x, &offsets, packed, target)?.0)
    }

    /// Scores as [`Model::forward`] gives them, of the first exit at which the likeliest answer of every row has a
    /// probability above `threshold`, or of the whole model (always at a threshold of 1); and the layers that ran.
    pub fn forward_early(
        &self,
        input: Input,
        lengths: Option<&[usize]>,
        threshold: f32,
    ) -> Result<(Tensor<2>, usize), ModelError> {
        let mut found = None;
        let mut leave =
            |exit: &Exit, x: &Tensor<3>, offsets: &[usize]| -> Result<bool, ModelError> {
                let scores = exit.head.all_scores(exit.norm(x.clone()), offsets)?;
                let sure = confidence(&scores) > threshold;
                if sure {
                    found = Some((scores, exit.after));
                }
                Ok(sure)
            };
        let mut watch = Watch {
            leave: Some(&mut leave),
            ..Watch::default()
        };
        let (x, at) = self.encode(input, lengths, self.context(), &mut watch)?;
        match found {
            Some(found) => Ok(found),
            None => Ok((self.head.all_scores(x, &at)?, self.config.layers)),
        }
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

    /// Whether `count` sequences can be read on from `state` and leave one.
    fn can_go_on(&self, count: usize, state: Option<&ModelState>) -> Result<(), ModelError> {
        if let Some(state) = state
            && state.times.len() != count
        {
            return Err(ModelError::Input(format!(
                "the state holds {} sequences, the input {count}",
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
        Ok(())
    }

    /// A pass that keeps its state, going on from `state`; of a model that [`Model::can_go_on`].
    fn carried(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&ModelState>,
    ) -> Result<(Tensor<3>, ModelState), ModelError> {
        match self.hidden(x, None, context, state, &mut Watch::default())? {
            (x, Some(next)) => Ok((x, next)),
            (_, None) => panic!("a mixer whose card says that it streams gave no state"),
        }
    }

    fn read(
        &self,
        ids: &[u32],
        batch: usize,
        lengths: Option<&[usize]>,
        state: Option<&ModelState>,
    ) -> Result<(Tensor<2>, ModelState), ModelError> {
        self.can_go_on(batch, state)?;
        let mut context = Context {
            keep_state: true,
            ..self.context()
        };
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
        let (x, next) = self.carried(x, &context, state)?;
        let last = pooled(x, &offsets, Pool::Last);
        Ok((self.head.scores(last), next))
    }

    /// Reads a piece of each sequence of `state`, going on from there, and returns the scores after every token `[tokens, vocab]`,
    /// the sequences end to end, with the state after the last of each.
    pub fn scores_of_each(
        &self,
        pieces: &[&[u32]],
        state: &ModelState,
    ) -> Result<(Tensor<2>, ModelState), ModelError> {
        self.can_go_on(pieces.len(), Some(state))?;
        on_worker(|| {
            let ids = pieces.concat();
            let x = self.embed.tokens(&ids, 1)?;
            let mut context = Context {
                keep_state: true,
                ..self.context()
            };
            if pieces.len() > 1 {
                let lengths = pieces.iter().map(|piece| piece.len());
                context.offsets = Some(Arc::new(cumulative(lengths)));
            }
            let (x, next) = self.carried(x, &context, Some(state))?;
            let rows = x.reshape([ids.len(), self.config.dim]);
            Ok((self.head.scores(rows), next))
        })
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
