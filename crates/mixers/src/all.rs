//! The list of every mixer. One sorted line per architecture; everything else derives from it.

use crate::card::{ChannelEntry, ConfigError, TokenEntry, nearest_name};
use crate::{
    attention, bigbird, combiner, compressive, cosformer, delta_net, fnet, gated_delta_net, gla,
    linear_attention, linformer, local, longformer, lru, luna, mamba, mamba2, mlp, moe, none,
    nystromformer, performer, pool, reformer, retention, routing, s4d, sinkhorn, sparse, swiglu,
    synthesizer, transformer_xl,
};

/// Every token mixer, sorted by name.
static TOKEN: &[&TokenEntry] = &[
    &attention::ENTRY,
    &bigbird::ENTRY,
    &combiner::ENTRY,
    &compressive::ENTRY,
    &cosformer::ENTRY,
    &delta_net::ENTRY,
    &fnet::ENTRY,
    &gated_delta_net::ENTRY,
    &gla::ENTRY,
    &linear_attention::ENTRY,
    &linformer::ENTRY,
    &local::ENTRY,
    &longformer::ENTRY,
    &lru::ENTRY,
    &luna::ENTRY,
    &mamba::ENTRY,
    &mamba2::ENTRY,
    &nystromformer::ENTRY,
    &performer::ENTRY,
    &pool::ENTRY,
    &reformer::ENTRY,
    &retention::ENTRY,
    &routing::ENTRY,
    &s4d::ENTRY,
    &sinkhorn::ENTRY,
    &sparse::ENTRY,
    &synthesizer::ENTRY,
    &transformer_xl::ENTRY,
];

/// Every channel mixer, sorted by name.
static CHANNEL: &[&ChannelEntry] = &[&mlp::ENTRY, &moe::ENTRY, &none::ENTRY, &swiglu::ENTRY];

/// Every token mixer, sorted by name.
pub fn token_mixers() -> &'static [&'static TokenEntry] {
    TOKEN
}

/// Every channel mixer, sorted by name.
pub fn channel_mixers() -> &'static [&'static ChannelEntry] {
    CHANNEL
}

/// The token mixer of that name.
pub fn token_mixer(name: &str) -> Result<&'static TokenEntry, ConfigError> {
    let names = || TOKEN.iter().map(|entry| entry.card.name);
    let found = TOKEN.iter().find(|entry| entry.card.name == name);
    found.copied().ok_or_else(|| ConfigError::UnknownMixer {
        kind: "token mixer",
        name: name.to_string(),
        hint: nearest_name(name, names()),
    })
}

/// The channel mixer of that name.
pub fn channel_mixer(name: &str) -> Result<&'static ChannelEntry, ConfigError> {
    let names = || CHANNEL.iter().map(|entry| entry.card.name);
    let found = CHANNEL.iter().find(|entry| entry.card.name == name);
    found.copied().ok_or_else(|| ConfigError::UnknownMixer {
        kind: "channel mixer",
        name: name.to_string(),
        hint: nearest_name(name, names()),
    })
}
