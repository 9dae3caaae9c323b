//! Anyformer data.
