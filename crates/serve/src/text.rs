//! Tokens of an answer as text for a client: whole characters only, and nothing of a stop string.

use std::sync::Arc;

use anyformer_data::{Detokenizer, Tokenizer};
use anyformer_models::Stops;
use tokio::sync::mpsc::UnboundedSender;

use crate::engine::job::{End, Go, JobError, Sink, Token};

/// What comes out of a [`TextSink`].
#[derive(Debug)]
pub enum Part {
    /// Text that can be shown (it may be empty), and the token that brought it.
    Text(String, Token),
    /// The rest of the text, and the end.
    End(String, Result<End, JobError>),
}

/// A sink that sends text into a channel shared by several answers.
pub struct TextSink {
    index: usize,
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: Stops,
    channel: UnboundedSender<(usize, Part)>,
    stopped: bool,
}

impl TextSink {
    /// `index` marks what comes from this answer.
    pub fn new(
        index: usize,
        tokenizer: Arc<Tokenizer>,
        stops: Vec<String>,
        channel: UnboundedSender<(usize, Part)>,
    ) -> Self {
        TextSink {
            index,
            tokenizer,
            detokenizer: Detokenizer::default(),
            stops: Stops::new(&stops),
            channel,
            stopped: false,
        }
    }
}

impl Sink for TextSink {
    fn token(&mut self, token: Token) -> Go {
        let text = self.detokenizer.push(&self.tokenizer, token.id);
        let (text, found) = self.stops.push(&text);
        self.stopped = found;
        // Whether anyone listens is asked before the next step.
        let _ = self.channel.send((self.index, Part::Text(text, token)));
        match found {
            true => Go::Stop,
            false => Go::On,
        }
    }

    fn is_gone(&self) -> bool {
        self.channel.is_closed()
    }

    fn end(mut self: Box<Self>, mut end: Result<End, JobError>) {
        let mut rest = String::new();
        if !self.stopped {
            let text = self.detokenizer.finish(&self.tokenizer);
            let (text, found) = self.stops.push(&text);
            rest = text;
            match (found, &mut end) {
                (true, Ok(end)) => end.finish = crate::engine::job::Finish::Stop,
                (true, Err(_)) => {}
                (false, _) => rest.push_str(&self.stops.finish()),
            }
        }
        // A receiver that went away wants no end.
        let _ = self.channel.send((self.index, Part::End(rest, end)));
    }
}
