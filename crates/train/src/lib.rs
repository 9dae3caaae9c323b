//! Anyformer train.
