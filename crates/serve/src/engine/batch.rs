//! The engine's thread: which sequences run, and one step after another.

mod ahead;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use anyformer_data::Constraint;
use anyformer_models::{Model, ModelError, ModelState, Sampler, likeliest, log_prob};
use anyformer_ops::{Tensor, tensor_values};

use super::job::{End, Finish, Go, JobError, Sink, Token};
use super::queue::{Command, Queue, Waiting};
use super::states::States;
use super::{EngineConfig, fits};
use crate::metrics::Metrics;

/// Why a sequence is at its end.
type Ended = Result<Finish, JobError>;

/// A sequence that runs.
struct Sequence {
    ids: Vec<u32>,
    prompt: usize,
    cached: usize,
    made: usize,
    max_tokens: usize,
    stop_ids: Arc<Vec<u32>>,
    logprobs: Option<usize>,
    save: Option<String>,
    deadline: Option<Instant>,
    grammar: Option<Constraint>,
    sampler: Sampler,
    sink: Box<dyn Sink>,
    since: Instant,
    last: Option<Instant>,
}

/// A sequence whose prompt is not read yet, with the state so far.
struct Reading {
    sequence: Sequence,
    state: Option<ModelState>,
}

impl Reading {
    fn read(&self) -> usize {
        self.state.as_ref().map_or(0, |state| state.times[0])
    }
}

pub(super) struct Worker {
    model: Model,
    config: EngineConfig,
    queue: Arc<Queue>,
    metrics: Metrics,
    states: States,
    reading: VecDeque<Reading>,
    /// The sequences that make tokens, and their states joined in the same order.
    running: Vec<Sequence>,
    joined: Option<ModelState>,
}

impl Worker {
    pub(super) fn new(
        model: Model,
        config: EngineConfig,
        queue: Arc<Queue>,
        metrics: Metrics,
        states: States,
    ) -> Self {
        Worker {
            model,
            config,
            queue,
            metrics,
            states,
            reading: VecDeque::new(),
            running: Vec::new(),
            joined: None,
        }
    }

    /// Until the queue is closed and nothing is left.
    pub(super) fn run(mut self) {
        loop {
            let active = self.reading.len() + self.running.len();
            let room = self.config.batch.saturating_sub(active);
            let Some(taken) = self.queue.take(room, active == 0) else {
                break;
            };
            for command in taken.commands {
                self.answer(command);
            }
            for waiting in taken.jobs {
                self.admit(waiting);
            }
            let worked = catch_unwind(AssertUnwindSafe(|| {
                self.sweep(taken.abort);
                self.read_prompts();
                self.decode();
            }));
            if worked.is_err() {
                self.fail_all();
            }
            let active = self.reading.len() + self.running.len();
            self.metrics.running.set(active as i64);
            self.metrics.waiting.set(self.queue.waiting() as i64);
            let (states, bytes) = self.states.held();
            self.metrics.states.set(states as i64);
            self.metrics.state_bytes.set(bytes as i64);
        }
        self.states.spill_all();
    }

    /// A panic is a bug: whoever was in the batch is told, and the engine goes on without them.
    fn fail_all(&mut self) {
        self.joined = None;
        let reading = self.reading.drain(..).map(|reading| reading.sequence);
        let all: Vec<Sequence> = reading.chain(self.running.drain(..)).collect();
        for sequence in all {
            let error = JobError::Model("it panicked; this is a bug".into());
            end(&self.metrics, sequence, Err(error));
        }
    }

    fn answer(&mut self, command: Command) {
        match command {
            Command::List(answer) => answer(self.states.list()),
            Command::Delete(name, answer) => answer(Ok(self.states.delete(&name))),
            Command::Fork {
                from,
                to,
                tokens,
                answer,
            } => answer(self.states.fork(&from, &to, tokens)),
        }
    }

    fn admit(&mut self, Waiting { job, since }: Waiting) {
        let sink = job.sink;
        if sink.is_gone() {
            self.metrics
                .finished
                .with_label_values(&["cancelled"])
                .inc();
            return;
        }
        self.metrics.queue.observe(since.elapsed().as_secs_f64());
        let mut ids = Vec::new();
        if let Some(name) = &job.state {
            match self.states.ids(name) {
                Some(held) => ids.extend_from_slice(held),
                None => return sink.end(Err(JobError::NoState(name.clone()))),
            }
        }
        ids.extend(job.ids);
        if let Err(error) = fits(ids.len(), job.max_tokens, self.config.context) {
            return sink.end(Err(JobError::TooLong(error)));
        }
        let mut sampler = match Sampler::new(job.options) {
            Ok(sampler) => sampler.with_bias(job.bias),
            Err(error) => return sink.end(Err(JobError::Model(error.to_string()))),
        };
        sampler.see(&ids);
        let found = self.states.find(&ids, ids.len().saturating_sub(1));
        let cached = found.as_ref().map_or(0, |(_, length)| *length);
        match cached {
            0 => self.metrics.cache_misses.inc(),
            _ => self.metrics.cache_hits.inc(),
        }
        self.metrics.cached_tokens.inc_by(cached as u64);
        self.metrics
            .prompt_tokens
            .inc_by((ids.len() - cached) as u64);
        self.reading.push_back(Reading {
            sequence: Sequence {
                prompt: ids.len(),
                ids,
                cached,
                made: 0,
                max_tokens: job.max_tokens,
                stop_ids: job.stop_ids,
                logprobs: job.logprobs,
                save: job.save,
                deadline: job.deadline,
                grammar: job.grammar,
                sampler,
                sink,
                since,
                last: None,
            },
            state: found.map(|(state, _)| state),
        });
    }

    /// Ends sequences that nobody waits for, that are late, and, when the server stops, all.
    fn sweep(&mut self, abort: bool) {
        let dropped = self.queue.drop_gone();
        let cancelled = self.metrics.finished.with_label_values(&["cancelled"]);
        cancelled.inc_by(dropped as u64);
        let now = Instant::now();
        let over = |sequence: &Sequence| match sequence {
            _ if abort => Some(JobError::Stopping),
            sequence if sequence.deadline.is_some_and(|at| at <= now) => Some(JobError::Timeout),
            _ => None,
        };
        for _ in 0..self.reading.len() {
            let Some(reading) = self.reading.pop_front() else {
                break;
            };
            match over(&reading.sequence) {
                _ if reading.sequence.sink.is_gone() => cancelled.inc(),
                Some(error) => end(&self.metrics, reading.sequence, Err(error)),
                None => self.reading.push_back(reading),
            }
        }
        let leaves = |sequence: &Sequence| sequence.sink.is_gone() || over(sequence).is_some();
        let stay: Vec<bool> = self
            .running
            .iter()
            .map(|sequence| !leaves(sequence))
            .collect();
        for (sequence, _) in self.retain(&stay) {
            match over(&sequence) {
                _ if sequence.sink.is_gone() => cancelled.inc(),
                Some(error) => end(&self.metrics, sequence, Err(error)),
                None => {}
            }
        }
    }

    /// Takes the sequences that do not stay out of the batch, each with its state.
    fn retain(&mut self, stay: &[bool]) -> Vec<(Sequence, ModelState)> {
        let Some(joined) = self.joined.take() else {
            return Vec::new();
        };
        if stay.iter().all(|stays| *stays) {
            self.joined = Some(joined);
            return Vec::new();
        }
        let mut left = Vec::new();
        let mut kept = Vec::new();
        for (index, sequence) in std::mem::take(&mut self.running).into_iter().enumerate() {
            match stay[index] {
                true => {
                    kept.push(index);
                    self.running.push(sequence);
                }
                false => left.push((sequence, joined.select(&[index]))),
            }
        }
        self.joined = (!kept.is_empty()).then(|| joined.select(&kept));
        left
    }

    /// One piece of each of the first prompts, as many as the budget of tokens allows; then those prompts go to the back.
    fn read_prompts(&mut self) {
        let mut taken = Vec::new();
        let mut tokens = 0;
        while let Some(reading) = self.reading.front() {
            let at = reading.read();
            let to =
                ((at / self.config.chunk + 1) * self.config.chunk).min(reading.sequence.prompt);
            if tokens > 0 && tokens + to - at > self.config.prefill {
                break;
            }
            tokens += to - at;
            if let Some(reading) = self.reading.pop_front() {
                taken.push((reading, to));
            }
        }
        // Those that go on need their states; the others have none.
        let (fresh, later): (Vec<_>, Vec<_>) = taken
            .into_iter()
            .partition(|(reading, _)| reading.state.is_none());
        for group in [fresh, later] {
            if !group.is_empty() {
                self.read_pieces(group);
            }
        }
    }

    fn read_pieces(&mut self, group: Vec<(Reading, usize)>) {
        let pieces: Vec<&[u32]> = group
            .iter()
            .map(|(reading, to)| &reading.sequence.ids[reading.read()..*to])
            .collect();
        let held: Vec<&ModelState> = group
            .iter()
            .filter_map(|(reading, _)| reading.state.as_ref())
            .collect();
        let state = match held.len() {
            0 => None,
            1 => Some(held[0].clone()),
            _ => Some(ModelState::join(&held)),
        };
        let (scores, next) = match run_packed(&self.model, &pieces, state.as_ref()) {
            Ok(made) => made,
            Err(error) => {
                for (reading, _) in group {
                    let error = JobError::Model(error.to_string());
                    end(&self.metrics, reading.sequence, Err(error));
                }
                return;
            }
        };
        let single = group.len() == 1;
        let vocab = scores.dims()[1];
        let scores = tensor_values(scores);
        for (index, (mut reading, to)) in group.into_iter().enumerate() {
            let state = match single {
                true => next.clone(),
                false => next.select(&[index]),
            };
            let whole = to == reading.sequence.prompt;
            // Attention's cache of the whole prompt stands for its beginnings too.
            if whole || !self.rolls(&state) {
                self.states.keep(&reading.sequence.ids[..to], state.clone());
            }
            if !whole {
                reading.state = Some(state);
                self.reading.push_back(reading);
                continue;
            }
            let mut sequence = reading.sequence;
            let row = &scores[index * vocab..(index + 1) * vocab];
            match self.choose(&mut sequence, row) {
                Some(finish) => self.finish(sequence, state, finish),
                None => {
                    self.joined = Some(match self.joined.take() {
                        Some(joined) => ModelState::join(&[&joined, &state]),
                        None => state,
                    });
                    self.running.push(sequence);
                }
            }
        }
    }

    fn rolls(&self, state: &ModelState) -> bool {
        state.rolled_back(1).is_some()
    }

    /// One token more for every running sequence.
    fn decode(&mut self) {
        if self.config.speculate > 0 && self.decode_ahead() {
            return;
        }
        let Some(joined) = &self.joined else {
            return;
        };
        let last = |sequence: &Sequence| sequence.ids[sequence.ids.len() - 1];
        let ids: Vec<u32> = self.running.iter().map(last).collect();
        self.metrics.batch_size.observe(ids.len() as f64);
        let (scores, next) = match self.model.step(&ids, joined) {
            Ok(made) => made,
            Err(error) => return self.fail_running(&error),
        };
        self.joined = Some(next);
        let vocab = scores.dims()[1];
        let scores = tensor_values(scores);
        let mut running = std::mem::take(&mut self.running);
        let finishes: Vec<Option<Ended>> = running
            .iter_mut()
            .zip(scores.chunks(vocab))
            .map(|(sequence, row)| self.choose(sequence, row))
            .collect();
        self.running = running;
        self.leave(finishes);
    }

    /// Tells every running sequence of an error of the model, and ends it.
    fn fail_running(&mut self, error: &ModelError) {
        self.joined = None;
        for sequence in self.running.drain(..) {
            let error = JobError::Model(error.to_string());
            end(&self.metrics, sequence, Err(error));
        }
    }

    /// Takes those out of the batch that have come to their end.
    fn leave(&mut self, finishes: Vec<Option<Ended>>) {
        let stay: Vec<bool> = finishes.iter().map(Option::is_none).collect();
        let ended = finishes.into_iter().flatten();
        for ((sequence, state), finish) in self.retain(&stay).into_iter().zip(ended) {
            self.finish(sequence, state, finish);
        }
    }

    /// Chooses the next token, gives it away, and says whether it was the last.
    fn choose(&self, sequence: &mut Sequence, scores: &[f32]) -> Option<Ended> {
        if sequence.made == sequence.max_tokens {
            return Some(Ok(Finish::Length));
        }
        let (id, complete) = match ahead::chosen(sequence, scores) {
            Ok(Some(chosen)) => chosen,
            Ok(None) => return Some(Ok(Finish::Stop)),
            Err(error) => return Some(Err(JobError::Model(error.to_string()))),
        };
        let now = Instant::now();
        match sequence.last {
            None => &self.metrics.first_token,
            Some(_) => &self.metrics.inter_token,
        }
        .observe((now - sequence.last.unwrap_or(sequence.since)).as_secs_f64());
        sequence.last = Some(now);
        sequence.ids.push(id);
        sequence.made += 1;
        self.metrics.completion_tokens.inc();
        if sequence.stop_ids.contains(&id) {
            return Some(Ok(Finish::Stop));
        }
        let (logprob, top) = match sequence.logprobs {
            Some(count) => logprobs(scores, id, count),
            None => (None, Vec::new()),
        };
        match sequence.sink.token(Token { id, logprob, top }) {
            Go::Stop => Some(Ok(Finish::Stop)),
            Go::On if complete => Some(Ok(Finish::Stop)),
            Go::On if sequence.made == sequence.max_tokens => Some(Ok(Finish::Length)),
            Go::On => None,
        }
    }

    /// Keeps the state, and tells the end. The last token has been made and not read.
    fn finish(&mut self, sequence: Sequence, state: ModelState, finish: Ended) {
        let finish = match finish {
            Ok(finish) => finish,
            Err(error) => return end(&self.metrics, sequence, Err(error)),
        };
        let time = state.times[0];
        self.states.keep(&sequence.ids[..time], state.clone());
        let saved = match &sequence.save {
            Some(name) => self
                .states
                .save(name, sequence.ids.clone(), Some(state))
                .err(),
            None => None,
        };
        let ended = match saved {
            Some(message) => Err(JobError::Save(message)),
            None => Ok(End {
                finish,
                prompt_tokens: sequence.prompt,
                cached_tokens: sequence.cached,
                completion_tokens: sequence.made,
            }),
        };
        end(&self.metrics, sequence, ended);
    }
}

fn end(metrics: &Metrics, sequence: Sequence, ended: Result<End, JobError>) {
    let reason = match &ended {
        Ok(End {
            finish: Finish::Stop,
            ..
        }) => "stop",
        Ok(_) => "length",
        Err(JobError::Timeout) => "timeout",
        Err(_) => "error",
    };
    metrics.finished.with_label_values(&[reason]).inc();
    metrics
        .total
        .observe(sequence.since.elapsed().as_secs_f64());
    sequence.sink.end(ended);
}

/// Runs pieces of several sequences packed end to end; the scores after the last token of each.
fn run_packed(
    model: &Model,
    pieces: &[&[u32]],
    state: Option<&ModelState>,
) -> Result<(Tensor<2>, ModelState), ModelError> {
    if let [piece] = pieces {
        return model.prefill(piece, 1, Some(&[piece.len()]), state);
    }
    let lengths: Vec<usize> = pieces.iter().map(|piece| piece.len()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    // The model takes padded rows and packs them before its first operation.
    let mut ids = vec![0; pieces.len() * longest];
    for (row, piece) in ids.chunks_mut(longest).zip(pieces) {
        row[..piece.len()].copy_from_slice(piece);
    }
    model.prefill(&ids, pieces.len(), Some(&lengths), state)
}

/// Log-probability of `id` and the `count` likeliest tokens with theirs.
fn logprobs(scores: &[f32], id: u32, count: usize) -> (Option<f32>, Vec<(u32, f32)>) {
    let of = |id: u32| (id, log_prob(scores, id));
    let top = likeliest(scores, count).into_iter().map(of).collect();
    (Some(log_prob(scores, id)), top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_of_the_softmax_and_sorted() {
        let scores = [1f32.ln(), 2f32.ln(), 5f32.ln(), 2f32.ln()];
        let (own, top) = logprobs(&scores, 0, 3);
        assert!((own.unwrap() - 0.1f32.ln()).abs() < 1e-6);
        let ids: Vec<u32> = top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [2, 1, 3]);
        assert!((top[0].1 - 0.5f32.ln()).abs() < 1e-6);
        assert!(logprobs(&scores, 1, 0).1.is_empty());
    }
}
