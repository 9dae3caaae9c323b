//! Local attention: softmax attention over a sliding window of the last tokens.
//!
//! Beltagy et al., Longformer (2020), arXiv 2004.05150 (the window part); Jiang et al., Mistral 7B (2023),
//! arXiv 2310.06825. The mixer is [`crate::attention`] with a window; its state is bounded by it.
//!
//! What the code released with Long Range Arena (arXiv 2011.04006) computes under this name is another thing: of `n` groups
//! each has every `n`-th token of the text, and tokens see their group. The text is made longer by zeros to a multiple of
//! `window`, a whole window where it is one already, and the zeros take part.

use anyformer_ops::{Tensor, meter};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::attention::{Attention, AttentionConfig, KNOBS};
use crate::card::{
    Card, ConfigError, Direction, Knob, Options, TokenEntry, chance, head_dim, read, resolve,
};
use crate::groups::{Lines, Seen, Whole, WholeMixer, rows};
use crate::mixer::{Context, Cost};
use crate::parts::Projections;

/// Knobs: those of attention, and one more.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LocalConfig {
    /// Attention's.
    #[serde(flatten)]
    pub attention: AttentionConfig,
    /// What the code released with Long Range Arena computes.
    pub lra_compat: bool,
}

const COMPAT: Knob = Knob {
    name: "lra_compat",
    doc: "what the code released with Long Range Arena computes: tokens see every n-th token of the text, window of them, zeros at the end among them; looks both ways, no positions; of the other knobs heads, window, bias and dropout count",
};

/// Attention's knobs and [`COMPAT`].
static ALL: [Knob; KNOBS.len() + 1] = {
    let mut all = [COMPAT; KNOBS.len() + 1];
    let mut at = 0;
    while at < KNOBS.len() {
        all[at] = KNOBS[at];
        at += 1;
    }
    all
};

static CARD: Card = Card {
    name: "local",
    title: "Local (sliding-window) attention",
    paper: "Beltagy et al.: Longformer (2020), arXiv 2004.05150; Jiang et al.: Mistral 7B (2023), arXiv 2310.06825",
    equation: "o_i = sum over i - window < j <= i of softmax_j(q_i . k_j / sqrt(head_dim)) v_j",
    direction: Direction::Either,
    streams: true,
    state: "constant: keys and values of the last window - 1 tokens, and of the sinks where there are any",
    notes: "Linear in time. After n layers a token has seen n·(window - 1) tokens back, no further. Without causal, the window reaches to both sides. lra_compat is what the code released with Long Range Arena runs under this name: no window, but strided groups that never mix.",
    knobs: &ALL,
    presets: &[],
};

/// The window when none is given.
const WINDOW: usize = 64;

fn with_window(options: &Options) -> Result<Options, ConfigError> {
    let mut options = options.clone();
    let mut or = |key: &str, value: serde_json::Value| {
        options.entry(key).or_insert(value);
    };
    or("window", json!(WINDOW));
    let compat = options.get("lra_compat") == Some(&json!(true));
    if compat {
        let mut or = |key: &str, value: serde_json::Value| {
            options.entry(key).or_insert(value);
        };
        or("causal", json!(false));
        or("position", json!("none"));
    }
    let resolved = resolve::<LocalConfig>(&CARD, &options)?;
    let impossible = |message: &str| {
        Err(ConfigError::Impossible {
            mixer: CARD.name,
            message: message.into(),
        })
    };
    if compat && (resolved["causal"] == json!(true) || resolved["position"] != json!("none")) {
        return impossible(
            "lra_compat looks both ways and knows no positions: leave out causal and position",
        );
    }
    match resolved.get("window").and_then(|window| window.as_u64()) {
        Some(0) | None => {
            impossible("window must be at least 1; for attention without a window use attention")
        }
        Some(_) => Ok(resolved),
    }
}

/// The registered entry.
pub static ENTRY: TokenEntry = TokenEntry {
    card: &CARD,
    resolve: with_window,
    build: |dim, options, builder| {
        let config: LocalConfig = read(&CARD, &with_window(options)?)?;
        if !config.lra_compat {
            let attention = Attention::new(&CARD, dim, &config.attention, builder)?;
            return Ok(Box::new(attention));
        }
        let AttentionConfig {
            heads,
            window,
            bias,
            dropout,
            ..
        } = config.attention;
        chance(&CARD, dropout)?;
        let head_dim = head_dim(&CARD, dim, heads)?;
        Ok(Box::new(WholeMixer(Strided {
            projections: Projections::new(builder, dim, heads, bias),
            heads,
            head_dim,
            window,
            dropout,
        })))
    },
};

/// The released form.
struct Strided {
    projections: Projections,
    heads: usize,
    head_dim: usize,
    window: usize,
    dropout: f64,
}

impl Strided {
    /// Groups of a text: as many windows as its length with the zeros has.
    fn groups(&self, time: usize) -> usize {
        time / self.window + 1
    }
}

impl Whole for Strided {
    fn name(&self) -> &'static str {
        CARD.name
    }

    fn all(&self, x: Tensor<3>, offsets: &[usize], context: &Context) -> Tensor<3> {
        let [q, k, v] = self.projections.split(&x).map(rows);
        let lines = Lines {
            offsets,
            heads: self.heads,
        };
        let count = q.dims()[0];
        // The row behind all tokens: a zero, or what the layers make of a zero.
        let none = x.clone().narrow(1, 0, 1).zeros_like();
        let beside = meter::apart(|| self.projections.split(&none));
        let [_, k_zero, v_zero] = beside.map(rows);
        let zero = |line: usize| count + line % self.heads;
        let mut seen = Seen::default();
        for line in 0..lines.count() {
            let (time, groups) = (lines.time(line), self.groups(lines.time(line)));
            for first in 0..groups {
                let places = || (first..groups * self.window).step_by(groups);
                let tokens = || places().filter(|place| *place < time);
                seen.queries
                    .push(tokens().map(|token| lines.row(line, token)));
                seen.keys.push(places().map(|place| match place < time {
                    true => lines.row(line, place),
                    false => zero(line),
                }));
            }
        }
        let k = Tensor::cat(vec![k, k_zero], 0);
        let v = Tensor::cat(vec![v, v_zero], 0);
        let options = context.attention(self.dropout, 0);
        let o = seen.attend_rows([&q, &k, &v], options);
        self.projections
            .join(o.reshape([1, count / self.heads, self.heads, self.head_dim]))
    }

    fn layers(&self, time: usize) -> Cost {
        self.projections.cost(time)
    }

    fn counted_flops(&self, time: usize) -> u64 {
        (4 * time * self.window * self.heads * self.head_dim) as u64
    }
}
