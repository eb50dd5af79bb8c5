use super::caller::Authenticated;
#[utoipa::path(get, path = "/logs", tag = "logs", responses((status = 200)))]
pub async fn search(_: Authenticated) -> &'static str { "" }
