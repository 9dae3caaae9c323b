//! Texts that end a generation.

/// Watches a text that comes in pieces for the first of some stop strings. What may be the beginning of one is held back.
#[derive(Clone, Debug, Default)]
pub struct Stops {
    strings: Vec<String>,
    held: String,
}

impl Stops {
    /// A watch for `strings`; empty ones are left out.
    pub fn new(strings: &[String]) -> Self {
        let strings = strings.iter().filter(|string| !string.is_empty());
        Stops {
            strings: strings.cloned().collect(),
            held: String::new(),
        }
    }

    /// Adds a piece: what can be shown now, and whether a stop string came, which is not shown, nor is what follows it.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let first = self.strings.iter().filter_map(|stop| self.held.find(stop));
        if let Some(at) = first.min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest end of the text that begins a stop string.
        let begins = |at: &usize| {
            let end = &self.held[*at..];
            self.strings.iter().any(|stop| stop.starts_with(end))
        };
        let places = self.held.char_indices().map(|(at, _)| at);
        let keep = places.into_iter().find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What is left when no more will come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_are_found_however_the_text_is_cut() {
        let text = "aßb END ENDE after";
        for size in 1..8 {
            let mut stops = Stops::new(&["ENDE".into(), "\n".into(), String::new()]);
            let mut shown = String::new();
            let letters: Vec<char> = text.chars().collect();
            let mut stopped = false;
            for piece in letters.chunks(size) {
                let (part, now) = stops.push(&piece.iter().collect::<String>());
                shown += &part;
                stopped = now;
                if now {
                    break;
                }
            }
            assert!(stopped);
            assert_eq!(shown, "aßb END ", "pieces of {size}");
        }
        let mut stops = Stops::new(&["xyz".into()]);
        assert_eq!(stops.push("ab x"), ("ab ".into(), false));
        assert_eq!(stops.push("yw"), ("xyw".into(), false));
        assert_eq!(stops.push("x").0 + &stops.finish(), "x");
    }

    #[test]
    fn nothing_of_a_stop_string_is_shown() {
        let run = |stops: &[&str], pieces: &[&str]| {
            let mut stop = Stops::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>());
            let mut shown = Vec::new();
            for piece in pieces {
                let (text, found) = stop.push(piece);
                shown.push(text);
                if found {
                    return (shown, true);
                }
            }
            shown.push(stop.finish());
            (shown, false)
        };
        let (shown, found) = run(
            &["END", "\n\n"],
            &["a", "bE", "N", "x\n", "y", "E", "ND", "z"],
        );
        assert!(found);
        assert_eq!(shown.concat(), "abENx\ny");
        assert_eq!(shown[1], "b");
        assert_eq!(
            run(&["END"], &["EN"]),
            (vec!["".into(), "EN".into()], false)
        );
        assert_eq!(run(&[], &["x"]).0, ["x", ""]);
        assert_eq!(run(&["é!"], &["aé", "b"]).0.concat(), "aéb");
    }
}
