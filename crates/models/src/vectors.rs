//! A model as an encoder: a vector for each text.

use anyformer_ops::Tensor;
use anyformer_ops::workers::on_worker;

use crate::config::{ModelError, Pool};
use crate::exits::Watch;
use crate::input::Input;
use crate::model::Model;
use crate::rows::pooled;

impl Model {
    /// Pooled hidden vectors `[rows, dim]` of sequences of unequal length, packed: what an encoder makes of each.
    pub fn vectors(&self, rows: &[&[u32]], pool: Pool) -> Result<Tensor<2>, ModelError> {
        if rows.is_empty() || rows.iter().any(|row| row.is_empty()) {
            return Err(ModelError::Input("a sequence without tokens".into()));
        }
        let lengths: Vec<usize> = rows.iter().map(|row| row.len()).collect();
        let (batch, longest) = (rows.len(), lengths.iter().copied().max().unwrap_or(0));
        let mut ids = vec![0; batch * longest];
        for (padded, row) in ids.chunks_mut(longest).zip(rows) {
            padded[..row.len()].copy_from_slice(row);
        }
        on_worker(|| {
            let input = Input::Tokens { ids: &ids, batch };
            let (context, watch) = (self.context(), &mut Watch::default());
            let (x, offsets) = self.encode(input, Some(&lengths), context, watch)?;
            Ok(pooled(x, &offsets, pool))
        })
    }

    /// Holds the weights of linear layers from now on in the order in which products on the CPU read them: for inference that reads
    /// many tokens at once, as an encoder does. See [`anyformer_ops::Param::panel`].
    pub fn panel(&self) {
        let embedding = self.embed.weight().map(|weight| weight.name());
        for param in self.params().params() {
            if param.packs() && Some(param.name()) != embedding {
                param.panel(self.config().precision.into());
            }
        }
    }
}
