//! What is in Elasticsearch, asked directly.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Ids asked for at once: the most that a search gives.
const PAGE: usize = 10_000;

/// Longest wait for Elasticsearch to have room for a question.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Index {
    url: String,
    prefix: String,
    client: reqwest::Client,
}

impl Index {
    /// Indices of their own on the server in `ELASTICSEARCH_HOST`.
    pub fn new() -> Self {
        let url = std::env::var("ELASTICSEARCH_HOST").expect("ELASTICSEARCH_HOST is not set");
        Self {
            url: url.trim_end_matches('/').to_owned(),
            prefix: format!("test-{}", uuid::Uuid::now_v7()),
            client: reqwest::Client::new(),
        }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    async fn post(&self, path: &str, body: Option<&Value>) -> Value {
        let url = format!("{}/{}-logs-*/{path}", self.url, self.prefix);
        let begin = Instant::now();
        loop {
            let mut call = self.client.post(&url);
            if let Some(body) = body {
                call = call.json(body);
            }
            let answer = call.send().await.unwrap();
            let status = answer.status();
            let body: Value = answer.json().await.unwrap();
            // A small Elasticsearch under a full load has no room for a question now and then, and an index that
            // is being made has no shard to ask yet.
            let later = status == 429 || status == 503;
            if later && begin.elapsed() < PATIENCE {
                tokio::time::sleep(Duration::from_millis(500)).await;
                continue;
            }
            assert!(status.is_success(), "{body}");
            return body;
        }
    }

    /// Records that can be found now.
    pub async fn count(&self) -> usize {
        self.post("_refresh", None).await;
        let counted = self.post("_count", None).await;
        usize::try_from(counted["count"].as_u64().unwrap()).unwrap()
    }

    /// The id of each record.
    pub async fn ids(&self) -> Vec<String> {
        self.post("_refresh", None).await;
        let (mut ids, mut behind) = (Vec::new(), Value::Null);
        loop {
            let mut body = json!({
                "size": PAGE,
                "_source": false,
                "track_total_hits": false,
                // With the index: a record in two of them counts twice.
                "sort": [{"gantry.position": "asc"}, {"@timestamp": "asc"}, {"_index": "asc"}],
            });
            if !behind.is_null() {
                body["search_after"] = behind;
            }
            let found = self.post("_search", Some(&body)).await;
            let hits = found["hits"]["hits"].as_array().unwrap();
            let Some(last) = hits.last() else { return ids };
            behind = last["sort"].clone();
            ids.extend(
                hits.iter()
                    .map(|hit| hit["_id"].as_str().unwrap().to_owned()),
            );
        }
    }

    pub async fn remove(&self) {
        let indices = format!("{}/_cat/indices/{}-*?h=index", self.url, self.prefix);
        let names = self.client.get(indices).send().await.unwrap();
        let names = names.text().await.unwrap();
        let templates =
            ["logs", "journals"].map(|t| format!("_index_template/{}-{t}", self.prefix));
        let all = names.lines().map(str::to_owned).chain(templates);
        for path in all {
            let url = format!("{}/{path}", self.url);
            self.client.delete(url).send().await.unwrap();
        }
    }
}
