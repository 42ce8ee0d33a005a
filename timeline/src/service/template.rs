//! The template: made before the first project asks for it.

use std::sync::Arc;

use super::Service;

impl Service {
    /// Makes the newest version's template in the background, and brings it to this node, so that creating a project
    /// is only ledger work and its first wake has nothing to fetch.
    pub(super) fn prepare_template(self: &Arc<Self>) {
        let service = self.clone();
        self.tasks.spawn(async move {
            let prepared = async {
                let pg_major = service.node.pg_major(None)?;
                let layer = service.node.template(pg_major).await?;
                service.node.fetch(layer).await
            };
            // Not fatal: whoever needs the template tries again, and is told why it cannot be had.
            tokio::select! {
                outcome = prepared => if let Err(error) = outcome {
                    service.report("preparing the template", &error);
                },
                () = service.stopping.cancelled() => {}
            }
        });
    }
}
