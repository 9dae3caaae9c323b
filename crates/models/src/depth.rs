//! The pass along the depth: blocks one after the other, kept whole, run again, or as two streams that run backwards.

use std::sync::Arc;

use anyformer_mixers::{Context, Losses, RunError, State};
use anyformer_ops::Tensor;
use anyformer_ops::recompute::{Function, Given, recomputed, reversible};

use crate::block::{Block, Stream};
use crate::config::{ModelConfig, ModelError, Wiring};
use crate::exits::{Exit, Watch};
use crate::first_conv::FirstConv;
use crate::state::ModelState;

/// The blocks of a model, and where it may be left.
pub(crate) struct Depth<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) blocks: &'a [Arc<Block>],
    /// Added to what the first layer gives.
    pub(crate) first_conv: Option<&'a FirstConv>,
    pub(crate) exits: &'a [Exit],
}

/// What came out: the stream of hidden vectors, the layers' states, and whether an exit was taken.
pub(crate) struct Passed {
    pub(crate) stream: Stream,
    pub(crate) states: Vec<State>,
    pub(crate) left: bool,
}

/// Part of a block as a function of its input alone, with the losses that it leaves.
fn alone(
    block: &Arc<Block>,
    context: &Context,
    part: impl Fn(&Block, Tensor<3>, &Context) -> Result<Tensor<3>, RunError> + Send + Sync + 'static,
) -> Function<RunError> {
    let (block, context) = (block.clone(), context.clone());
    Arc::new(move |x| {
        let losses = context.losses.as_ref().map(|_| Losses::default());
        let context = Context {
            losses: losses.clone(),
            ..context.clone()
        };
        let y = part(&block, x, &context)?;
        let loss = losses.and_then(|losses| losses.sum());
        Ok(Given { y, loss })
    })
}

impl Depth<'_> {
    /// The block of a layer; layers that share their weights share it.
    fn block(&self, layer: usize) -> &Arc<Block> {
        &self.blocks[layer % self.blocks.len()]
    }

    /// Whether the model is left after `layer`, with the hidden vectors there.
    fn leaves(
        &self,
        layer: usize,
        x: impl FnOnce() -> Tensor<3>,
        context: &Context,
        watch: &mut Watch,
    ) -> Result<bool, ModelError> {
        let Some(leave) = &mut watch.leave else {
            return Ok(false);
        };
        let Some(exit) = self.exits.iter().find(|exit| exit.after == layer + 1) else {
            return Ok(false);
        };
        let x = x();
        let [batch, time, _] = x.dims();
        leave(exit, &x, &context.sequences(batch, time))
    }

    /// Runs the layers over `[batch, time, dim]`.
    pub(crate) fn run(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&ModelState>,
        watch: &mut Watch,
    ) -> Result<Passed, ModelError> {
        if self.config.reversible {
            return self.two_streams(x, context, state, watch);
        }
        let (mut stream, mut states) = (Stream::new(x), Vec::new());
        for layer in 0..self.config.layers {
            if watch.skip.get(layer) != Some(&true) {
                let held = state.map(|state| &state.layers[layer]);
                let first = self.first_conv.filter(|_| layer == 0);
                let first = first.map(|conv| (conv, stream.sum()));
                if watch.recompute && held.is_none() && !context.keep_state {
                    let whole = move |block: &Block, x: Tensor<3>, context: &Context| {
                        let (mut after, _) = block.forward(layer, Stream::new(x), context, None)?;
                        Ok(after.sum())
                    };
                    let given =
                        recomputed(stream.sum(), &alone(self.block(layer), context, whole))?;
                    add_loss(context, given.loss);
                    stream = Stream::new(given.y);
                } else {
                    let (after, next) = self.block(layer).forward(layer, stream, context, held)?;
                    stream = after;
                    states.extend(next);
                }
                if let Some((conv, before)) = first {
                    stream = Stream::new(conv.forward(before, stream.sum(), context));
                }
            }
            if self.leaves(layer, || stream.sum(), context, watch)? {
                let left = true;
                return Ok(Passed {
                    stream,
                    states,
                    left,
                });
            }
        }
        let left = false;
        Ok(Passed {
            stream,
            states,
            left,
        })
    }

    /// The stream that a layer's token mixer is added to; its channel mixer is added to the other. A layer with one branch
    /// changes one stream, the next the other.
    fn to(&self, layer: usize) -> usize {
        let one = self.config.channel.name == "none" || self.config.wiring == Wiring::Parallel;
        if one { layer % 2 } else { 0 }
    }

    /// Two streams that begin as the same vectors and end as their mean. Where a state is carried nothing is recomputed:
    /// the layers run one by one.
    fn two_streams(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&ModelState>,
        watch: &mut Watch,
    ) -> Result<Passed, ModelError> {
        let mean = |[a, b]: [Tensor<3>; 2]| (a + b) * 0.5;
        let carries = context.keep_state || state.is_some();
        let mut streams = [x.clone(), x];
        let (mut waiting, mut states) = (Vec::new(), Vec::new());
        let run = |streams: &mut [Tensor<3>; 2], waiting: &mut Vec<_>| {
            let (next, loss) = reversible(streams.clone(), &std::mem::take(waiting))?;
            *streams = next;
            add_loss(context, loss);
            Ok::<(), RunError>(())
        };
        for layer in 0..self.config.layers {
            if watch.skip.get(layer) != Some(&true) {
                let (block, to) = (self.block(layer), self.to(layer));
                let parallel = self.config.wiring == Wiring::Parallel;
                let channel = move |block: &Block, x: Tensor<3>, context: &Context| {
                    Ok(match block.channel_part(layer, x.clone(), context) {
                        Some(y) => y,
                        None => x.zeros_like(),
                    })
                };
                if carries {
                    let held = state.map(|state| &state.layers[layer]);
                    let from = streams[1 - to].clone();
                    let (y, next) = block.token_part(layer, from.clone(), context, held)?;
                    streams[to] = streams[to].clone() + y;
                    states.extend(next);
                    if block.has_channel() {
                        let (to, from) = match parallel {
                            true => (to, from),
                            false => (1 - to, streams[to].clone()),
                        };
                        streams[to] = streams[to].clone() + channel(block, from, context)?;
                    }
                } else {
                    let token = move |block: &Block, x: Tensor<3>, context: &Context| {
                        let (y, _) = block.token_part(layer, x.clone(), context, None)?;
                        Ok(match parallel && block.has_channel() {
                            true => y + channel(block, x, context)?,
                            false => y,
                        })
                    };
                    waiting.push((to, alone(block, context, token)));
                    if block.has_channel() && !parallel {
                        waiting.push((1 - to, alone(block, context, channel)));
                    }
                }
            }
            let at_exit = self.exits.iter().any(|exit| exit.after == layer + 1);
            if at_exit && watch.leave.is_some() {
                run(&mut streams, &mut waiting)?;
            }
            if self.leaves(layer, || mean(streams.clone()), context, watch)? {
                let (stream, left) = (Stream::new(mean(streams)), true);
                return Ok(Passed {
                    stream,
                    states,
                    left,
                });
            }
        }
        run(&mut streams, &mut waiting)?;
        let (stream, left) = (Stream::new(mean(streams)), false);
        Ok(Passed {
            stream,
            states,
            left,
        })
    }
}

fn add_loss(context: &Context, loss: Option<Tensor<1>>) {
    if let (Some(losses), Some(loss)) = (&context.losses, loss) {
        losses.add(loss);
    }
}
