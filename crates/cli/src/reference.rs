//! The book's page of commands, derived from the list of flags.

use std::fmt::Write;

use anyformer_mixers::card::nearest_name;
use clap::{Arg, Command, CommandFactory};

use crate::args::Cli;
use crate::exit::{Failure, bad_input};

/// Every verb and flag in Markdown.
pub fn reference() -> String {
    let mut command = Cli::command();
    command.build();
    let mut text = String::from("# Commands\n\n");
    if let Some(about) = command.get_about() {
        let _ = writeln!(text, "{about}\n");
    }
    if let Some(after) = command.get_after_help() {
        let _ = writeln!(text, "{after}\n");
    }
    text.push_str("## Flags of every verb\n\n");
    flags(
        &mut text,
        command.get_arguments().filter(|arg| arg.is_global_set()),
    );
    for verb in verbs(&command) {
        describe(&mut text, verb, "##");
    }
    text
}

fn verbs(command: &Command) -> impl Iterator<Item = &Command> {
    command
        .get_subcommands()
        .filter(|verb| verb.get_name() != "help")
}

fn describe(text: &mut String, verb: &Command, level: &str) {
    let name = verb.get_bin_name().unwrap_or(verb.get_name());
    let _ = writeln!(text, "{level} `{name}`\n");
    if let Some(about) = verb.get_long_about().or(verb.get_about()) {
        let _ = writeln!(text, "{about}.\n");
    }
    let usage = verb.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim();
    let _ = writeln!(text, "```text\n{usage}\n```\n");
    flags(
        text,
        verb.get_arguments().filter(|arg| !arg.is_global_set()),
    );
    if let Some(after) = verb.get_after_help() {
        let _ = writeln!(text, "```text\n{}\n```\n", after.to_string().trim_end());
    }
    for inner in verbs(verb) {
        describe(text, inner, "###");
    }
}

fn flags<'a>(text: &mut String, arguments: impl Iterator<Item = &'a Arg>) {
    let shown =
        |arg: &&Arg| !arg.is_hide_set() && !["help", "version"].contains(&arg.get_id().as_str());
    let mut arguments = arguments.filter(shown).peekable();
    if arguments.peek().is_none() {
        return;
    }
    text.push_str("| flag | meaning |\n|---|---|\n");
    for arg in arguments {
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let defaults = arg
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy());
        let defaults: Vec<_> = defaults.collect();
        let default = match defaults.is_empty() || !arg.get_action().takes_values() {
            true => String::new(),
            false => format!(" (default `{}`)", defaults.join(" ")),
        };
        let help = help.replace('|', "\\|");
        let _ = writeln!(
            text,
            "| `{}` | {help}{default} |",
            spelled(arg).replace('|', "\\|")
        );
    }
    text.push('\n');
}

/// `--top-k <N>`, `-q, --quiet`, `<NAME>`, `[KEY=VALUE]...`.
fn spelled(arg: &Arg) -> String {
    if arg.is_positional() {
        return arg.to_string();
    }
    let short = arg
        .get_short()
        .map_or(String::new(), |short| format!("-{short}, "));
    format!("{short}{arg}")
}

/// The verb of that name.
pub(crate) fn find<'a>(command: &'a Command, name: &str) -> Result<&'a Command, Failure> {
    command.find_subcommand(name).ok_or_else(|| {
        let names = verbs(command).map(Command::get_name);
        let hint = nearest_name(name, names);
        let hint = hint.map_or(String::new(), |hint| format!("; did you mean {hint:?}?"));
        bad_input(format!("find the verb {name:?}: no such verb{hint}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_flag_has_help() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for verb in verbs(&command) {
            assert!(
                verb.get_about().is_some(),
                "{} has no description",
                verb.get_name()
            );
            for arg in verb.get_arguments() {
                assert!(
                    arg.get_help().is_some(),
                    "{} {arg} has no help",
                    verb.get_name()
                );
            }
        }
    }

    #[test]
    fn the_reference_has_every_verb_and_long_flag() {
        let text = reference();
        let mut command = Cli::command();
        command.build();
        for verb in verbs(&command) {
            assert!(text.contains(&format!("## `anyformer {}`", verb.get_name())));
            let longs = verb.get_arguments().filter_map(Arg::get_long);
            for long in longs.filter(|long| !["help", "version"].contains(long)) {
                assert!(text.contains(&format!("--{long}")), "{long}");
            }
        }
    }
}
