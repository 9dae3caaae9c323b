//! An answer as a stream: a piece for every text, one with the reason of the end, the usage where asked for, and `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::response::sse::Event;
use futures_core::Stream;
use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc::UnboundedReceiver;

use super::App;
use super::answer::{ASSISTANT, Form, TEXT, count, lost};
use super::error::ApiError;
use super::logprobs::{Placed, of_chat, of_text};
use super::replies::{
    ChatCompletionChunk, ChatPiece, Delta, Head, TextChoice, TextCompletion, Usage,
};
use crate::engine::job::Finish;
use crate::text::Part;

/// What is still to be sent of one request.
pub(super) struct Pieces {
    app: Arc<App>,
    head: Head,
    form: Form,
    receiver: UnboundedReceiver<(usize, Part)>,
    queue: VecDeque<String>,
    begun: Vec<bool>,
    offsets: Vec<usize>,
    left: usize,
    each: usize,
    usage: Usage,
    include_usage: bool,
    done: bool,
}

impl Pieces {
    /// A stream of `count` answers, `each` to a prompt, whose parts come from `receiver`.
    pub(super) fn new(
        app: Arc<App>,
        head: Head,
        form: Form,
        receiver: UnboundedReceiver<(usize, Part)>,
        count: usize,
        each: usize,
        include_usage: bool,
    ) -> Self {
        Pieces {
            app,
            head,
            form,
            receiver,
            queue: VecDeque::new(),
            begun: vec![false; count],
            offsets: vec![0; count],
            left: count,
            each,
            usage: Usage::default(),
            include_usage,
            done: false,
        }
    }

    fn send(&mut self, data: &impl Serialize) {
        self.queue.push_back(json!(data).to_string());
    }

    fn chat(&mut self, choices: Vec<ChatPiece>, usage: Option<Option<Usage>>) {
        let head = self.head.clone();
        self.send(&ChatCompletionChunk {
            head,
            object: "chat.completion.chunk",
            choices,
            usage,
        });
    }

    fn text(&mut self, choices: Vec<TextChoice>, usage: Option<Option<Usage>>) {
        let head = self.head.clone();
        self.send(&TextCompletion {
            head,
            object: TEXT,
            choices,
            usage,
        });
    }

    fn piece(&mut self, index: usize, text: String, tokens: &[Placed], finish: Option<Finish>) {
        let usage = self.include_usage.then_some(None);
        let begins = !std::mem::replace(&mut self.begun[index], true);
        match self.form {
            Form::Text => {
                let choice = TextChoice {
                    index,
                    text,
                    logprobs: of_text(&self.app, tokens),
                    finish_reason: finish,
                };
                self.text(vec![choice], usage);
            }
            Form::Chat => {
                let choice = ChatPiece {
                    index,
                    delta: Delta {
                        role: begins.then_some(ASSISTANT),
                        content: (begins || !text.is_empty()).then_some(text),
                    },
                    logprobs: of_chat(&self.app, tokens),
                    finish_reason: finish,
                };
                self.chat(vec![choice], usage);
            }
        }
    }

    /// Takes a part of one of the answers.
    pub(super) fn part(&mut self, index: usize, part: Part) {
        match part {
            Part::Text(text, token) => {
                let at = self.offsets[index];
                self.offsets[index] += text.chars().count();
                if !text.is_empty() || token.logprob.is_some() || !self.begun[index] {
                    self.piece(index, text, &[(token, at)], None);
                }
            }
            Part::End(text, Ok(end)) => {
                count(&mut self.usage, index, self.each, &end);
                if !text.is_empty() {
                    self.piece(index, text, &[], None);
                }
                self.piece(index, String::new(), &[], Some(end.finish));
                self.left -= 1;
                if self.left == 0 {
                    if self.include_usage {
                        let usage = Some(Some(self.usage));
                        match self.form {
                            Form::Chat => self.chat(Vec::new(), usage),
                            Form::Text => self.text(Vec::new(), usage),
                        }
                    }
                    self.close();
                }
            }
            Part::End(_, Err(error)) => self.fail(&error.into()),
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.send(&error.body());
        self.close();
    }

    fn close(&mut self) {
        self.queue.push_back("[DONE]".into());
        self.done = true;
        self.receiver.close();
    }
}

impl Stream for Pieces {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(text) = self.queue.pop_front() {
                return Poll::Ready(Some(Ok(Event::default().data(text))));
            }
            if self.done {
                return Poll::Ready(None);
            }
            match self.receiver.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some((index, part))) => self.part(index, part),
                Poll::Ready(None) => self.fail(&lost()),
            }
        }
    }
}
