//! Whose a domain is: its owner alone can put a text into the DNS below it.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::try_join_all;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;
use tokio::time::timeout;

use crate::model::{Domain, DomainProof, Problem, UserId};

/// Longest wait for one answer of a name server; a lost packet is sent again after it.
const ANSWER: Duration = Duration::from_secs(3);

/// How often a name server is asked.
const TRIES: usize = 2;

/// Longest wait for all of it: both tries at two servers, and a TCP connection where a packet is too small.
const LOOKUP: Duration = Duration::from_secs(15);

/// The DNS, and what proofs are made for.
#[derive(Clone)]
pub struct Names {
    resolver: Result<TokioResolver, String>,
    installation: String,
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Names")
    }
}

impl Names {
    /// Asks this name server, or those of the machine. `installation`: another one has other proofs.
    pub fn new(nameserver: Option<SocketAddr>, installation: &str) -> Self {
        let builder = match nameserver {
            None => TokioResolver::builder_tokio(),
            Some(address) => Ok(TokioResolver::builder_with_config(
                one(address),
                TokioRuntimeProvider::default(),
            )),
        };
        let resolver = builder.and_then(|mut builder| {
            let options = builder.options_mut();
            options.timeout = ANSWER;
            options.attempts = TRIES;
            // Who was told that a proof is missing puts it there and asks again.
            options.cache_size = 0;
            builder.build()
        });
        Self {
            resolver: resolver.map_err(|error| error.to_string()),
            installation: installation.to_owned(),
        }
    }

    /// What the user is to put into the DNS for this domain.
    fn proof(&self, user: &UserId, domain: &Domain) -> DomainProof {
        DomainProof {
            domain: domain.clone(),
            name: domain.proof_name(),
            r#type: "TXT",
            value: domain.proof(&self.installation, user),
        }
    }

    /// The proofs that are not there.
    pub async fn missing(
        &self,
        user: &UserId,
        domains: &[Domain],
    ) -> Result<Vec<DomainProof>, Problem> {
        let looked = domains.iter().map(|domain| async {
            let proof = self.proof(user, domain);
            let found = self.has(&proof).await?;
            Ok((!found).then_some(proof))
        });
        let looked = try_join_all(looked).await?;
        Ok(looked.into_iter().flatten().collect())
    }

    async fn has(&self, proof: &DomainProof) -> Result<bool, Problem> {
        let resolver = self.resolver.as_ref().map_err(|why| silent(why))?;
        // From the root: nothing is to be added to it.
        let name = format!("{}.", proof.name);
        let found = match timeout(LOOKUP, resolver.txt_lookup(name)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) if error.is_no_records_found() => return Ok(false),
            Ok(Err(error)) => return Err(silent(&error.to_string())),
            Err(_) => return Err(silent(&format!("no answer within {} s", LOOKUP.as_secs()))),
        };
        let is_it = |data: &RData| match data {
            RData::TXT(text) => text.txt_data.concat() == proof.value.as_bytes(),
            _ => false,
        };
        Ok(found.answers().iter().any(|record| is_it(&record.data)))
    }
}

fn one(address: SocketAddr) -> ResolverConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
    let mut server = NameServerConfig::udp(address.ip());
    server.connections = connections
        .into_iter()
        .map(|mut connection| {
            connection.port = address.port();
            connection
        })
        .collect();
    ResolverConfig::from_name_servers(vec![server])
}

fn silent(why: &str) -> Problem {
    Problem::new(
        "dns_unavailable",
        "The DNS could not be asked whose the domain is",
        why,
        "Try again. The operator can name another name server with GANTRY_NAMESERVER.",
    )
}
