//! The events of a run, shown: a bar on a terminal, lines elsewhere, nothing when quiet.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyformer_lab::units::{count, grouped, seconds};
use anyformer_train::{Event, Events};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::say::Say;

/// Shows the events of one run.
pub(crate) struct Progress<'a> {
    say: &'a Say,
    bar: Option<ProgressBar>,
    steps: u64,
    began: Instant,
    first: u64,
    /// The latest evaluation.
    pub(crate) evaluated: Option<Event>,
}

impl<'a> Progress<'a> {
    pub(crate) fn new(say: &'a Say) -> Self {
        Progress {
            say,
            bar: None,
            steps: 0,
            began: Instant::now(),
            first: 0,
            evaluated: None,
        }
    }

    fn line(&self, text: String) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.say.note(text)),
            None => self.say.note(text),
        }
    }

    fn start(&mut self, step: u64, steps: u64) {
        self.steps = steps;
        self.first = step;
        self.began = Instant::now();
        if !self.say.can_redraw() {
            return;
        }
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr_with_hz(8));
        let shape = "{bar:28} {pos}/{len}  {msg}  {elapsed} gone";
        if let Ok(style) = ProgressStyle::with_template(shape) {
            bar.set_style(style);
        }
        bar.set_position(step);
        self.bar = Some(bar);
    }

    /// Time left at the speed of this sitting.
    fn left(&self, step: u64) -> String {
        let done = step.saturating_sub(self.first);
        if done == 0 {
            return "?".to_string();
        }
        let each = self.began.elapsed().as_secs_f64() / done as f64;
        seconds((each * self.steps.saturating_sub(step) as f64).round())
    }
}

/// `loss 1.234  accuracy 45.6 %  perplexity 3.44`.
pub(crate) fn score(loss: f64, accuracy: f64, perplexity: Option<f64>) -> String {
    let perplexity = perplexity.map_or(String::new(), |value| format!("  perplexity {value:.3}"));
    format!(
        "loss {loss:.4}  accuracy {:.2} %{perplexity}",
        100.0 * accuracy
    )
}

impl Events for Progress<'_> {
    fn event(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Started {
                step,
                steps,
                params,
                threads,
            } => {
                let going_on = if *step > 0 {
                    format!(", going on after step {step}")
                } else {
                    String::new()
                };
                let params = grouped(*params as u64);
                self.line(format!(
                    "{params} parameters, {steps} steps, {threads} threads{going_on}"
                ));
                self.start(*step, *steps);
            }
            Event::Step {
                step,
                loss,
                extra,
                tokens_per_second,
                ..
            } => {
                let speed = count(*tokens_per_second);
                let extra = extra.map_or(String::new(), |extra| format!(" + {extra:.4}"));
                let text = format!(
                    "loss {loss:.4}{extra}  {speed} tokens/s  {} left",
                    self.left(*step)
                );
                match &self.bar {
                    Some(bar) => {
                        bar.set_position(*step);
                        bar.set_message(text);
                    }
                    None => self.line(format!("step {step}/{}  {text}", self.steps)),
                }
            }
            Event::Evaluated {
                step,
                loss,
                accuracy,
                perplexity,
                ..
            } => {
                self.line(format!(
                    "step {step}  held out: {}",
                    score(*loss, *accuracy, *perplexity)
                ));
                self.evaluated = Some(event.clone());
            }
            Event::Warning { step, message } => {
                self.line(format!("step {step}  warning: {message}"))
            }
            Event::Checkpoint { .. } => {}
            Event::Stopped { .. } | Event::Finished { .. } => {
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
            }
        }
        Ok(())
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// A line redrawn in place for work whose length is not known: `what`, bytes so far.
pub(crate) fn spinner(say: &Say, what: &str) -> Option<ProgressBar> {
    if !say.can_redraw() {
        return None;
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_string());
    bar.enable_steady_tick(Duration::from_millis(200));
    Some(bar)
}

/// A path as a word of a shell command.
pub(crate) fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "-_./+:@%,".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}
