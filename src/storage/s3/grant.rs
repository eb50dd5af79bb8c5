//! What one pod may fetch: a presigned URL for each file of one release, or of one repl's current files. The
//! server hands the list to the pod's `gantry-runner fetch`; no key of the bucket leaves the server.

use std::time::Duration;

use aws_sdk_s3::presigning::PresigningConfig;
use serde::{Deserialize, Serialize};

use super::{Manifest, ManifestFile, Object, S3Store, innermost};
use crate::model::{Problem, RelativePath};

/// Where `gantry-runner fetch` waits for its list, on the pod's loopback address only.
pub const FETCH_PORT: u16 = 3_004;

/// What it says first, so that the server knows that it speaks to it and not to a program.
pub const FETCH_GREETING: &str = "gantry-fetch 1\n";

/// What it says when it has the whole list.
pub const FETCH_TAKEN: &str = "taken\n";

/// Largest list, as the line of JSON that it is sent as: 10,000 files with long names. The init container
/// has 128 MiB of memory.
pub const MAX_OFFER_BYTES: usize = 24 << 20;

/// How long a URL is valid. A fetch takes 45 s at most; the rest allows for a store whose clock is ahead.
const VALID: Duration = Duration::from_secs(5 * 60);

/// Most files. A submission brings far fewer; what somebody else put into the bucket may not.
const MAX_FILES: usize = 10_000;

/// Below this are releases, each with its manifest; elsewhere anybody may have put files.
const RELEASES: &str = "releases/";

/// Codes of the problems that another try does not get over.
pub const INCOMPLETE: &str = "fetch_incomplete";
/// The same: what is there may not be copied.
pub const REFUSED: &str = "fetch_refused";

/// What the server sends: one line of JSON.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offer {
    /// The files to copy.
    Files {
        /// Where they come from, for people.
        place: String,
        /// Each of them.
        files: Vec<GrantedFile>,
    },
    /// Why there are none.
    Refused(Problem),
}

/// One file and the right to read it.
#[derive(Serialize, Deserialize)]
pub struct GrantedFile {
    /// Where it goes, below the folder.
    pub path: String,
    /// A URL that reads it and nothing else, for a few minutes.
    pub url: String,
    /// What it must be, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<ManifestFile>,
}

impl S3Store {
    /// The right to read what is below `prefix`, file by file.
    pub async fn grant(&self, prefix: &str) -> Result<Offer, Problem> {
        // With the slash, so that code/my-repl is not code/my-repl-2 as well.
        let prefix = format!("{}/", prefix.trim_matches('/'));
        let place = format!("s3://{}/{prefix}", self.bucket);
        let paths = if prefix.starts_with(RELEASES) {
            let manifest = self.manifest(&prefix).await?;
            released(&prefix, &place, manifest)?
        } else {
            current(&prefix, &place, &self.list(&prefix, MAX_FILES).await?)?
        };
        if paths.len() > MAX_FILES {
            return Err(refused(
                &place,
                format!("it is more than {MAX_FILES} files"),
            ));
        }
        let mut files = Vec::with_capacity(paths.len());
        for (path, expected) in paths {
            let path = RelativePath::try_from(path).map_err(|why| refused(&place, why))?;
            let url = self.presigned(&format!("{prefix}{path}")).await?;
            files.push(GrantedFile {
                path: path.as_str().to_owned(),
                url,
                expected,
            });
        }
        Ok(Offer::Files { place, files })
    }

    /// A URL that reads this object, and nothing else, for a few minutes.
    async fn presigned(&self, key: &str) -> Result<String, Problem> {
        let failed = |error: String| {
            Problem::new(
                "store_failed",
                format!("No URL could be signed for {key}"),
                error,
                "Check AWS_ENDPOINT_URL, AWS_REGION and the keys.",
            )
        };
        let valid = PresigningConfig::expires_in(VALID).map_err(|e| failed(e.to_string()))?;
        let request = self.client.get_object().bucket(&self.bucket).key(key);
        let signed = request.presigned(valid).await;
        let signed = signed.map_err(|error| failed(innermost(&error)))?;
        Ok(signed.uri().to_owned())
    }
}

type Paths = Vec<(String, Option<ManifestFile>)>;

/// What belongs to a release: its manifest says so.
fn released(prefix: &str, place: &str, manifest: Option<Manifest>) -> Result<Paths, Problem> {
    let Some(manifest) = manifest else {
        let key = Manifest::key(prefix);
        let why = format!("{key} is not there, without which a release is not whole");
        return Err(incomplete(place, why));
    };
    let files = manifest.files.into_iter();
    Ok(files.map(|(path, file)| (path, Some(file))).collect())
}

/// What are a repl's current files: the listing says so.
fn current(prefix: &str, place: &str, objects: &[Object]) -> Result<Paths, Problem> {
    let paths: Paths = objects
        .iter()
        // Consoles show folders by empty objects with a slash at the end.
        .filter(|object| !object.key.ends_with('/'))
        .filter_map(|object| Some((object.key.strip_prefix(prefix)?.to_owned(), None)))
        .collect();
    if paths.is_empty() {
        return Err(incomplete(place, "nothing is there".to_owned()));
    }
    Ok(paths)
}

fn incomplete(place: &str, cause: String) -> Problem {
    Problem::new(
        INCOMPLETE,
        format!("There is no whole code at {place}"),
        cause,
        "Submit the code again; for code that another service puts there, check that it is below code/ in the bucket that S3_BUCKET names.",
    )
}

fn refused(place: &str, cause: String) -> Problem {
    Problem::new(
        REFUSED,
        format!("{place} is not copied"),
        cause,
        "Put only files with relative paths there, within the bounds.",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::storage::S3Config;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    /// A store over a bucket with these keys, whatever is in them: a real one keeps such keys out itself.
    fn store(keys: Vec<String>) -> S3Store {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) > 0 {
                    head.push(byte[0]);
                }
                let one =
                    |key: &String| format!("<Contents><Key>{key}</Key><Size>3</Size></Contents>");
                let objects: String = keys.iter().map(one).collect();
                let body = format!(
                    "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>"
                );
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                );
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        S3Store::open(S3Config {
            bucket: "b".to_owned(),
            region: "r".to_owned(),
            access_key_id: "k".to_owned(),
            secret_access_key: "the-secret".to_owned().into(),
            session_token: None,
            endpoint: Some(endpoint),
        })
    }

    #[tokio::test]
    async fn each_current_file_has_a_url_without_a_key() {
        let keys = ["code/r/a b/x.txt", "code/r/a b/"].map(str::to_owned);
        let offered = store(keys.to_vec()).grant("code/r").await.unwrap();
        let Offer::Files { place, files } = offered else {
            panic!("no files are offered");
        };
        assert_eq!((place.as_str(), files.len()), ("s3://b/code/r/", 1));
        assert_eq!(files[0].path, "a b/x.txt");
        let url = &files[0].url;
        assert!(
            url.contains("/b/code/r/a%20b/x.txt?") && url.contains("X-Amz-Expires=300&"),
            "{url}"
        );
        assert!(url.contains("X-Amz-SignedHeaders=host&"), "{url}");
        assert!(!url.contains("the-secret"), "{url}");
    }

    #[tokio::test]
    async fn names_that_lead_out_and_too_many_files_are_refused() {
        for bad in [
            "../out",
            "a/../../out",
            "/out",
            "a//b",
            "./a",
            "a/.",
            "..",
            "a\\b",
        ] {
            let refused = store(vec![format!("code/r/{bad}")]).grant("code/r/").await;
            assert_eq!(refused.err().unwrap().code, REFUSED, "{bad}");
        }
        // A key that is the prefix itself is a folder's mark.
        let nothing = store(vec!["code/r/".to_owned()]).grant("code/r/").await;
        assert_eq!(nothing.err().unwrap().code, INCOMPLETE);
        let many = (0..10_001).map(|n| format!("code/r/{n}")).collect();
        let refused = store(many).grant("code/r/").await;
        assert_eq!(refused.err().unwrap().code, "store_too_many");
    }
}
