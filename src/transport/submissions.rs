use super::caller::Authenticated;
#[utoipa::path(get, path = "/submissions", tag = "logs", responses((status = 200)))]
pub async fn list(_: Authenticated) -> &'static str { "" }
#[utoipa::path(get, path = "/submissions/{id}", tag = "logs", responses((status = 200)))]
pub async fn one(_: Authenticated) -> &'static str { "" }
