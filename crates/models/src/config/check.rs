//! What no model can be: refused before anything is allocated.

use anyformer_mixers::{channel_mixer, token_mixer};

use super::{Gives, ModelConfig, ModelError, Pool, Reads, Wiring};

/// The most layers that share their weights: nothing else bounds how long such a model runs.
const MOST_SHARED: usize = 1024;

impl ModelConfig {
    /// Refuses shared layers and narrow embeddings where they cannot be.
    fn check_sizes(&self) -> Result<(), ModelError> {
        let impossible = |message: String| Err(ModelError::Impossible(message));
        if self.share_layers > 0 && self.layers > MOST_SHARED {
            return impossible(format!(
                "share_layers is for at most {MOST_SHARED} layers, got {} layers",
                self.layers
            ));
        }
        if self.first_conv > 0 && (self.causal() || self.first_conv.is_multiple_of(2)) {
            return impossible(
                "first_conv is odd and looks both ways: the mixers must, too".into(),
            );
        }
        if self.embed_dim == 0 {
            return Ok(());
        }
        let tied = matches!(self.gives, Gives::NextToken { tied: true });
        let token = matches!(
            self.gives,
            Gives::Class {
                pool: Pool::Cls,
                ..
            }
        );
        match self.reads {
            Reads::Patches { .. } => {
                impossible("embed_dim is of token vectors, not of patches".into())
            }
            _ if token => impossible("embed_dim does not go with pool = \"cls\"".into()),
            _ if tied && self.embed_dim != self.dim => impossible(format!(
                "a head tied to vectors of embed_dim {} cannot score rows of dim {}; set tied = false",
                self.embed_dim, self.dim
            )),
            _ => Ok(()),
        }
    }

    /// Refuses two streams and chunks where they would be another function.
    fn check_memory(&self) -> Result<(), ModelError> {
        let impossible = |message: &str| Err(ModelError::Impossible(message.into()));
        if self.reversible && self.wiring == Wiring::PostNorm {
            return impossible(
                "reversible adds to streams that a norm after the sum would change; set wiring = \"pre_norm\" or \"parallel\"",
            );
        }
        if self.reversible && self.first_conv > 0 {
            return impossible(
                "first_conv stands beside the first layer of one stream; set reversible = false or first_conv = 0",
            );
        }
        if self.ff_chunks > 1 && self.channel.name == "moe" {
            return impossible(
                "ff_chunks would balance the experts chunk by chunk; take another channel mixer or ff_chunks = 0",
            );
        }
        Ok(())
    }

    /// Refuses what cannot be built, before anything is allocated. The mixers check their own knobs when built.
    pub fn check(&self) -> Result<(), ModelError> {
        let impossible = |message: String| Err(ModelError::Impossible(message));
        let (dim, layers) = (self.dim, self.layers);
        if dim == 0 || layers == 0 {
            return impossible(format!("dim {dim} and layers {layers} must be at least 1"));
        }
        if !(self.embed_std > 0.0 && self.embed_std.is_finite()) {
            return impossible(format!("embed_std {} must be above 0", self.embed_std));
        }
        if !(0.0..1.0).contains(&(self.dropout as f32)) {
            let got = self.dropout;
            return impossible(format!("dropout must be at least 0 and below 1, got {got}"));
        }
        if self.mixers.is_empty() {
            return impossible("mixers is empty; name at least one, as { name = \"gla\" }".into());
        }
        for spec in &self.mixers {
            (token_mixer(&spec.name)?.resolve)(&spec.options)?;
        }
        let (unique, mixers) = (self.unique_layers(), self.mixers.len());
        let same = self.mixers.iter().all(|mixer| *mixer == self.mixers[0]);
        if unique < self.layers && !same && !unique.is_multiple_of(mixers) {
            return impossible(format!(
                "share_layers {unique} gives layers the weights of others that have another mixer; make it a multiple of the {mixers} mixers"
            ));
        }
        let rising = self.exits.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = |exit: &usize| (1..self.layers).contains(exit);
        if !rising || !self.exits.iter().all(inside) {
            return impossible(format!(
                "exits {:?} must be rising numbers from 1 to {}: after so many of the {} layers",
                self.exits,
                self.layers - 1,
                self.layers
            ));
        }
        if !self.exits.is_empty() && self.gives == Gives::Hidden {
            return impossible(
                "exits give answers, and a model that gives hidden has no head".into(),
            );
        }
        (channel_mixer(&self.channel.name)?.resolve)(&self.channel.options)?;
        self.check_sizes()?;
        self.check_memory()?;
        match self.reads {
            Reads::Tokens { vocab: 0 } => impossible("vocab must be at least 1".into()),
            Reads::Patches {
                height,
                width,
                channels,
                patch,
            } => {
                let fits = patch > 0 && height % patch == 0 && width % patch == 0;
                if !fits || height * width * channels == 0 {
                    return impossible(format!(
                        "patch {patch} does not divide a picture of {height} x {width} x {channels}"
                    ));
                }
                match self.gives {
                    Gives::NextToken { .. } | Gives::MaskedToken => {
                        impossible("a model that reads patches gives a class, not tokens".into())
                    }
                    _ if self.token_types > 0 => {
                        impossible("a model that reads patches has no token_types".into())
                    }
                    Gives::Class { .. } | Gives::Hidden => Ok(()),
                }
            }
            Reads::Tokens { .. } => match self.gives {
                Gives::NextToken { .. } if !self.causal() => {
                    let names: Vec<&str> =
                        self.mixers.iter().map(|spec| spec.name.as_str()).collect();
                    impossible(format!(
                        "a model that gives the next token must not see it, and a mixer of {names:?} looks ahead; set its causal knob, take another mixer, or a task that gives a class"
                    ))
                }
                Gives::Class { classes: 0, .. } => impossible("classes must be at least 1".into()),
                _ => Ok(()),
            },
        }
    }
}
