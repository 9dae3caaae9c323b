//! The little world of the stories.

use rand_chacha::ChaCha8Rng;

use crate::task::below;

pub(super) const ROOMS: [&str; 6] = [
    "bedroom", "kitchen", "garden", "hallway", "bathroom", "office",
];
const PEOPLE: [&str; 4] = ["John", "Mary", "Sandra", "Daniel"];
const THINGS: [&str; 3] = ["apple", "football", "milk"];
const GOES: [&str; 5] = [
    "went to",
    "journeyed to",
    "travelled to",
    "moved to",
    "went back to",
];
const TAKES: [&str; 4] = ["grabbed", "took", "got", "picked up"];
const DROPS: [&str; 4] = ["dropped", "put down", "discarded", "left"];
/// Questions of one published story; a story here ends with one of them.
const ROUNDS: u32 = 5;

/// What is told, asked and right.
#[derive(Debug)]
pub(super) struct Story {
    pub(super) sentences: Vec<String>,
    pub(super) question: String,
    pub(super) answer: String,
}

impl Story {
    /// Bytes of all of it.
    pub(super) fn length(&self) -> usize {
        let told: usize = self
            .sentences
            .iter()
            .map(|sentence| sentence.len() + 1)
            .sum();
        told + self.question.len() + self.answer.len() + 1
    }
}

fn pick<'a, T>(rng: &mut ChaCha8Rng, from: &'a [T]) -> &'a T {
    &from[below(rng, from.len() as u32) as usize]
}

/// Where people are, whether the reader knows it, and who holds what.
struct World {
    room: [usize; 4],
    known: [bool; 4],
    holder: [Option<usize>; 3],
    lies: [usize; 3],
    /// Rooms of a thing that the reader can name, without repeats in a row.
    history: [Vec<usize>; 3],
    told: Vec<String>,
}

impl World {
    fn new() -> Self {
        World {
            room: [1, 0, 2, 3],
            known: [false; 4],
            holder: [None; 3],
            lies: [1, 2, 1],
            history: Default::default(),
            told: Vec::new(),
        }
    }

    fn note(&mut self, thing: usize, room: usize) {
        if self.history[thing].last() != Some(&room) {
            self.history[thing].push(room);
        }
    }

    fn go(&mut self, rng: &mut ChaCha8Rng) {
        let who = below(rng, 4) as usize;
        let room = (self.room[who] + 1 + below(rng, 5) as usize) % 6;
        self.told.push(format!(
            "{} {} the {}.",
            PEOPLE[who],
            pick(rng, &GOES),
            ROOMS[room]
        ));
        self.room[who] = room;
        self.known[who] = true;
        for thing in 0..3 {
            if self.holder[thing] == Some(who) {
                self.note(thing, room);
            }
        }
    }

    /// Takes or drops, where that can be done.
    fn handle(&mut self, take: bool, rng: &mut ChaCha8Rng) -> bool {
        let (who, thing) = (below(rng, 4) as usize, below(rng, 3) as usize);
        let words = match take {
            true if self.holder[thing].is_none() && self.lies[thing] == self.room[who] => {
                self.holder[thing] = Some(who);
                if self.known[who] {
                    self.note(thing, self.room[who]);
                }
                pick(rng, &TAKES)
            }
            false if self.holder[thing] == Some(who) => {
                self.holder[thing] = None;
                self.lies[thing] = self.room[who];
                pick(rng, &DROPS)
            }
            _ => return false,
        };
        self.told
            .push(format!("{} {words} the {}.", PEOPLE[who], THINGS[thing]));
        true
    }

    /// One of take, drop and go, each as likely before the impossible ones are put aside.
    fn act(&mut self, rng: &mut ChaCha8Rng) {
        for _ in 0..100 {
            match below(rng, 3) {
                0 => return self.go(rng),
                kind => {
                    if self.handle(kind == 1, rng) {
                        return;
                    }
                }
            }
        }
    }

    fn ask(self, question: String, room: usize) -> Story {
        Story {
            sentences: self.told,
            question,
            answer: ROOMS[room].into(),
        }
    }
}

/// Questions 1 to 3: after some of a story's rounds.
pub(super) fn places(question: u32, rng: &mut ChaCha8Rng) -> Story {
    let mut world = World::new();
    let rounds = 1 + below(rng, ROUNDS);
    if question == 1 {
        for _ in 0..2 * rounds {
            world.go(rng);
        }
        let known: Vec<usize> = (0..4).filter(|who| world.known[*who]).collect();
        let who = *pick(rng, &known);
        let room = world.room[who];
        return world.ask(format!("Where is {}?", PEOPLE[who]), room);
    }
    let mut asked = 0;
    loop {
        world.act(rng);
        if world.told.len() <= 2 || below(rng, 2) == 0 {
            continue;
        }
        let fits = |thing: &usize| match question {
            2 => world.holder[*thing].is_some_and(|who| world.known[who]),
            _ => world.history[*thing].len() >= 2,
        };
        let things: Vec<usize> = (0..3).filter(fits).collect();
        if things.is_empty() {
            continue;
        }
        asked += 1;
        if asked < rounds {
            continue;
        }
        let thing = *pick(rng, &things);
        let name = THINGS[thing];
        if question == 2 {
            let room = world.holder[thing].map_or(0, |who| world.room[who]);
            return world.ask(format!("Where is the {name}?"), room);
        }
        let list = &world.history[thing];
        let (last, before) = (list[list.len() - 1], list[list.len() - 2]);
        return world.ask(
            format!("Where was the {name} before the {}?", ROOMS[last]),
            before,
        );
    }
}

/// More than one of an animal.
pub(super) fn plural(animal: &str) -> String {
    match animal {
        "mouse" => "mice".into(),
        "wolf" => "wolves".into(),
        "sheep" => "sheep".into(),
        other => format!("{other}s"),
    }
}

fn shuffled<'a, T>(rng: &mut ChaCha8Rng, from: &'a [T]) -> Vec<&'a T> {
    let mut all: Vec<&T> = from.iter().collect();
    for at in (1..all.len()).rev() {
        all.swap(at, below(rng, at as u32 + 1) as usize);
    }
    all
}

/// Question 15: kinds fear kinds, four animals have names.
pub(super) fn deduction(rng: &mut ChaCha8Rng) -> Story {
    let kinds = shuffled(rng, &["mouse", "wolf", "sheep", "cat"]);
    let names = shuffled(rng, &["Gertrude", "Jessica", "Emily", "Winona"]);
    // Each kind fears another one.
    let fears: Vec<usize> = (0..4)
        .map(|kind| (kind + 1 + below(rng, 3) as usize) % 4)
        .collect();
    let mut sentences: Vec<String> = (0..4)
        .map(|kind| {
            let many = plural(kinds[kind]);
            let many = many[..1].to_uppercase() + &many[1..];
            format!("{many} are afraid of {}.", plural(kinds[fears[kind]]))
        })
        .collect();
    let kind_of: Vec<usize> = names.iter().map(|_| below(rng, 4) as usize).collect();
    let named = names.iter().zip(&kind_of);
    sentences.extend(named.map(|(name, kind)| format!("{name} is a {}.", kinds[*kind])));
    let sentences = shuffled(rng, &sentences).into_iter().cloned().collect();
    let who = below(rng, 4) as usize;
    Story {
        sentences,
        question: format!("What is {} afraid of?", names[who]),
        answer: kinds[fears[kind_of[who]]].to_string(),
    }
}

/// Question 16: animals of one kind have one colour.
pub(super) fn induction(rng: &mut ChaCha8Rng) -> Story {
    let kinds = shuffled(rng, &["swan", "lion", "rhino", "frog"]);
    let colours = shuffled(rng, &["white", "gray", "green", "yellow"]);
    let names = shuffled(rng, &["Lily", "Bernhard", "Greg", "Brian", "Julius"]);
    // The first two are of one kind; the second one's colour is asked for.
    let kind_of: Vec<usize> = (0..5usize).map(|at| at.saturating_sub(1) % 4).collect();
    let mut sentences: Vec<String> = names
        .iter()
        .zip(&kind_of)
        .map(|(name, kind)| format!("{name} is a {}.", kinds[*kind]))
        .collect();
    let coloured = (0..5).filter(|at| *at != 1);
    sentences.extend(coloured.map(|at| format!("{} is {}.", names[at], colours[kind_of[at]])));
    let sentences = shuffled(rng, &sentences).into_iter().cloned().collect();
    Story {
        sentences,
        question: format!("What color is {}?", names[1]),
        answer: colours[kind_of[1]].to_string(),
    }
}
