//! `anyformer list`.

use anyformer_mixers::{Card, channel_mixers, token_mixers};
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::format::table;
use crate::say::Say;

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Prints every mixer, task and preset.
pub fn run(_: &Args, say: &Say) -> Result<(), Failure> {
    let tokens: Vec<&Card> = token_mixers().iter().map(|entry| entry.card).collect();
    let channels: Vec<&Card> = channel_mixers().iter().map(|entry| entry.card).collect();
    let tasks = anyformer_data::tasks();
    let cards =
        |cards: &[&Card]| -> Vec<Value> { cards.iter().map(|card| card_json(card)).collect() };
    let value = json!({
        "token_mixers": cards(&tokens),
        "channel_mixers": cards(&channels),
        "tasks": tasks.iter().map(|task| json!({"name": task.name, "about": task.doc, "options": task.defaults()})).collect::<Vec<_>>(),
    });
    say.result(&value, || {
        let text = |text: &str| text.to_string();
        let yes = |yes: bool| text(if yes { "yes" } else { "no" });
        let rows = tokens.iter().map(|card| {
            let direction = text(direction(card));
            vec![
                text(card.name),
                direction,
                yes(card.streams),
                presets(card),
                text(card.title),
            ]
        });
        let mut out = String::from("Token mixers\n");
        out += &table(
            &["name", "direction", "streams", "presets", "architecture"],
            &[],
            &rows.collect::<Vec<_>>(),
        );
        let rows = channels
            .iter()
            .map(|card| vec![text(card.name), text(card.title)]);
        out += "\nChannel mixers\n";
        out += &table(&["name", "architecture"], &[], &rows.collect::<Vec<_>>());
        let rows = tasks
            .iter()
            .map(|task| vec![text(task.name), text(task.doc)]);
        out += "\nTasks\n";
        out += &table(&["name", "what it is"], &[], &rows.collect::<Vec<_>>());
        out += "\n`anyformer info NAME` tells more about a mixer.\n";
        out
    });
    Ok(())
}

/// `causal`, `bidirectional` or `either`, as in JSON.
pub(crate) fn direction(card: &Card) -> &'static str {
    match card.direction {
        anyformer_mixers::Direction::Causal => "causal",
        anyformer_mixers::Direction::Bidirectional => "bidirectional",
        anyformer_mixers::Direction::Either => "either",
    }
}

fn presets(card: &Card) -> String {
    let names: Vec<&str> = card.presets.iter().map(|preset| preset.name).collect();
    match names.is_empty() {
        true => "-".to_string(),
        false => names.join(" "),
    }
}

/// A card without its knobs.
pub(crate) fn card_json(card: &Card) -> Value {
    json!({
        "name": card.name,
        "title": card.title,
        "paper": card.paper,
        "direction": card.direction,
        "streams": card.streams,
        "state": card.state,
        "presets": card.presets.iter().map(|preset| preset.name).collect::<Vec<_>>(),
    })
}
