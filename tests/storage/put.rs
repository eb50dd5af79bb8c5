//! Objects put into a bucket past the store.

use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use gantry::storage::S3Config;
use secrecy::ExposeSecret;

/// A client of the bucket's server.
pub fn client(config: &S3Config) -> aws_sdk_s3::Client {
    let secret = config.secret_access_key.expose_secret();
    let mut settings = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(config.region.clone()))
        .credentials_provider(Credentials::new(
            &config.access_key_id,
            secret,
            None,
            None,
            "test",
        ))
        .http_client(
            aws_smithy_http_client::Builder::new()
                .tls_provider(aws_smithy_http_client::tls::Provider::Rustls(
                    aws_smithy_http_client::tls::rustls_provider::CryptoMode::Ring,
                ))
                .build_https(),
        )
        .force_path_style(true);
    settings.set_endpoint_url(config.endpoint.clone());
    aws_sdk_s3::Client::from_conf(settings.build())
}

/// An object put past the store, as somebody else would.
pub async fn put(config: &S3Config, key: &str, text: &str) {
    client(config)
        .put_object()
        .bucket(&config.bucket)
        .key(key)
        .body(text.as_bytes().to_vec().into())
        .send()
        .await
        .unwrap();
}
