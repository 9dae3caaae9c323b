//! Local attention: softmax attention over a sliding window of the last tokens.
//!
//! Beltagy et al., Longformer (2020), arXiv 2004.05150 (the window part); Jiang et al., Mistral 7B (2023),
//! arXiv 2310.06825. The mixer is [`crate::attention`] with a window; its state is bounded by it.

use crate::attention::{Attention, AttentionConfig, KNOBS};
use crate::card::{Card, ConfigError, Direction, Options, TokenEntry, read, resolve};

static CARD: Card = Card {
    name: "local",
    title: "Local (sliding-window) attention",
    paper: "Beltagy et al.: Longformer (2020), arXiv 2004.05150; Jiang et al.: Mistral 7B (2023), arXiv 2310.06825",
    equation: "o_i = sum over i - window < j <= i of softmax_j(q_i . k_j / sqrt(head_dim)) v_j",
    direction: Direction::Either,
    streams: true,
    state: "constant: keys and values of the last window - 1 tokens",
    notes: "Linear in time. After n layers a token has seen n·(window - 1) tokens back, no further. Without causal, the window reaches to both sides.",
    knobs: KNOBS,
    presets: &[],
};

/// The window when none is given.
const WINDOW: usize = 64;

fn with_window(options: &Options) -> Result<Options, ConfigError> {
    let mut options = options.clone();
    if !options.contains_key("window") {
        options.insert("window".into(), WINDOW.into());
    }
    let resolved = resolve::<AttentionConfig>(&CARD, &options)?;
    match resolved.get("window").and_then(|window| window.as_u64()) {
        Some(0) | None => Err(ConfigError::Impossible {
            mixer: CARD.name,
            message: "window must be at least 1; for attention without a window use attention"
                .into(),
        }),
        Some(_) => Ok(resolved),
    }
}

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: with_window,
    build: |dim, options, builder| {
        let config: AttentionConfig = read(&CARD, &with_window(options)?)?;
        Ok(Box::new(Attention::new(&CARD, dim, &config, builder)?))
    },
};
