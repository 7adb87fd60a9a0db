//! Proof that travels: bundles for machines with a GPU, and the ledger of what ran there.

pub(crate) mod bundle;
mod launch_code;
pub(crate) mod ledger;
pub(crate) mod record;
pub(crate) mod rows;
pub(crate) mod status;
pub(crate) mod transports;
