//! The other members of the cluster: how they are reached, and what they are told.

pub mod snapshot;
