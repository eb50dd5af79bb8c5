//! What a repl keeps in the cluster beside its code: the volume of its database, whose size bounds it.

use kube::ResourceExt;

use super::super::cluster::{Failure, Kind};
use super::super::labels::{KEEP, REPL};
use super::super::release::{DATABASE_ROOM, database_name};
use super::Releases;
use crate::model::{ReplData, ReplId, UserId, repl_runs};
use crate::platform::PlatformError;

impl Releases {
    /// See [`Platform::data`](crate::platform::Platform::data). How full the volume is only its node knows.
    pub async fn data(&self, repl: &ReplId) -> Result<ReplData, PlatformError> {
        let user = self.known_owner(repl)?;
        let failed =
            |failure: Failure| failure.unavailable("The repl's data could not be looked at");
        let claims = self.data_claims(&user, repl).await.map_err(failed)?;
        Ok(ReplData {
            bytes: claims.is_empty().then_some(0),
            limit_bytes: Some(DATABASE_ROOM),
            ..ReplData::default()
        })
    }

    /// See [`Platform::delete_data`](crate::platform::Platform::delete_data). The password stays: the next
    /// database is made with it.
    pub async fn delete_data(&self, repl: &ReplId) -> Result<(), PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let user = self.known_owner(repl)?;
        let failed = |failure: Failure| failure.unavailable("The repl's data could not be deleted");
        // Another server may have started it since the watch told.
        let record = self.records.fresh(repl).await.map_err(failed)?;
        if record.is_some_and(|record| record.wanted) {
            return Err(PlatformError::NotReady(repl_runs(repl)));
        }
        let namespace = user.namespace();
        for claim in self.data_claims(&user, repl).await.map_err(failed)? {
            let kind = Kind::PersistentVolumeClaim;
            let deleted = self.cluster.delete(kind, &namespace, &claim, None);
            deleted.await.map_err(failed)?;
        }
        Ok(())
    }

    fn known_owner(&self, repl: &ReplId) -> Result<UserId, PlatformError> {
        self.owner(repl)
            .ok_or_else(|| PlatformError::NotFound(format!("the repl {repl}")))
    }

    /// Names of the volume claims of the repl's database.
    pub(super) async fn data_claims(
        &self,
        user: &UserId,
        repl: &ReplId,
    ) -> Result<Vec<String>, Failure> {
        let labels = format!("{REPL}={repl},{KEEP}");
        let kind = Kind::PersistentVolumeClaim;
        let claims = self
            .cluster
            .list(kind, Some(&user.namespace()), &labels)
            .await?;
        let names = claims.iter().map(ResourceExt::name_any);
        let named = format!("data-{}-", database_name(repl));
        Ok(names.filter(|name| name.starts_with(&named)).collect())
    }
}
