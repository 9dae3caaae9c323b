//! Log-probabilities in the two forms in which clients know them.

use serde_json::json;

use super::App;
use super::replies::{ChatLogprobs, ChatToken, TextLogprobs, TokenLogprob};
use crate::engine::job::Token;

/// A token of an answer, and where in the answer's text it begins, in characters.
pub(super) type Placed = (Token, usize);

fn are_told(tokens: &[Placed]) -> bool {
    tokens.iter().any(|(token, _)| token.logprob.is_some())
}

fn text(app: &App, id: u32) -> String {
    String::from_utf8_lossy(&app.tokenizer.decode(&[id])).into_owned()
}

/// For `/v1/chat/completions`; `None` where they were not asked for.
pub(super) fn of_chat(app: &App, tokens: &[Placed]) -> Option<ChatLogprobs> {
    let one = |id: u32, logprob: Option<f32>| TokenLogprob {
        token: text(app, id),
        logprob: logprob.map(f64::from),
        bytes: app.tokenizer.decode(&[id]),
    };
    let told = |(token, _): &Placed| {
        let top = token.top.iter();
        ChatToken {
            own: one(token.id, token.logprob),
            top_logprobs: top.map(|(id, logprob)| one(*id, Some(*logprob))).collect(),
        }
    };
    are_told(tokens).then(|| ChatLogprobs {
        content: tokens.iter().map(told).collect(),
    })
}

/// For `/v1/completions`; `None` where they were not asked for.
pub(super) fn of_text(app: &App, tokens: &[Placed]) -> Option<TextLogprobs> {
    if !are_told(tokens) {
        return None;
    }
    let mut told = TextLogprobs::default();
    for (token, at) in tokens {
        let top = token.top.iter();
        let top = top.map(|(id, logprob)| (text(app, *id), json!(logprob)));
        told.tokens.push(text(app, token.id));
        told.token_logprobs.push(token.logprob.map(f64::from));
        told.top_logprobs.push(top.collect());
        told.text_offset.push(*at);
    }
    Some(told)
}
