//! What deleting one checkpoint would free.

use std::collections::HashMap;

use ebb_types::{BranchId, CheckpointName, LayerId};

use super::{Owner, claim};
use crate::Result;
use crate::reach::{self, Keeper, Root};
use crate::service::Service;
use crate::state::ProjectState;

impl Service {
    /// For each checkpoint of a branch, bytes in the bucket that nothing but its name keeps. What the window needs as well
    /// is not its own.
    pub(in crate::service) async fn own_bytes(
        &self,
        state: &ProjectState,
        branch: BranchId,
    ) -> Result<HashMap<CheckpointName, u64>> {
        let known = self.collector.templates.lock().clone();
        let mut roots = match known {
            Some(templates) => templates,
            None => self.template_roots().await?,
        };
        roots.extend(reach::roots(state));
        let chains = self.chains(&roots.iter().map(|root| root.layer).collect()).await?;
        let mut owners: HashMap<LayerId, Owner<usize>> = HashMap::new();
        for (number, root) in roots.iter().enumerate() {
            for &layer in chains.get(&root.layer).into_iter().flat_map(|chain| chain.iter()) {
                claim(&mut owners, layer, number);
            }
        }
        let names: HashMap<usize, &CheckpointName> =
            roots.iter().enumerate().filter_map(|(number, root)| Some((number, name_on(root, branch)?))).collect();
        let own = |layer: &LayerId| match owners.get(layer) {
            Some(Owner::One(number)) => names.get(number).copied(),
            _ => None,
        };
        let sizes = self.sizes(owners.keys().filter(|layer| own(layer).is_some()).copied().collect()).await?;
        let mut bytes: HashMap<CheckpointName, u64> = names.values().map(|name| ((*name).clone(), 0)).collect();
        for (layer, size) in sizes {
            if let Some(sum) = own(&layer).and_then(|name| bytes.get_mut(name)) {
                *sum += size;
            }
        }
        Ok(bytes)
    }
}

/// The checkpoint that a root is, if it is one of the branch's.
fn name_on(root: &Root, branch: BranchId) -> Option<&CheckpointName> {
    match &root.keeper {
        Keeper::Checkpoint { checkpoint, .. } if root.owner == Some(branch) => Some(checkpoint),
        _ => None,
    }
}
