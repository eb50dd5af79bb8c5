//! A part of tests/bench/kubernetes.py: what a submission would cost with one kube exec each.

use std::io::BufRead;
use std::time::Instant;

use k8s_openapi::api::core::v1::Pod;
use kube::api::AttachParams;
use kube::{Api, Client};
use tokio::io::AsyncReadExt;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster, and tests/bench/kubernetes.py at its standard input"]
async fn one_exec_for_each_line() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (Ok(namespace), Ok(pod)) = (std::env::var("BENCH_NAMESPACE"), std::env::var("BENCH_POD"))
    else {
        println!("BENCH_NAMESPACE and BENCH_POD are not set: nothing to measure");
        return;
    };
    let pods: Api<Pod> = Api::namespaced(Client::try_default().await.unwrap(), &namespace);
    for _ in std::io::stdin().lock().lines() {
        let begin = Instant::now();
        let params = AttachParams::default().stdin(false).container("runner");
        let command = ["python3", "-c", "print('Hello')"];
        let mut process = pods.exec(&pod, command, &params).await.unwrap();
        let mut text = String::new();
        process
            .stdout()
            .unwrap()
            .read_to_string(&mut text)
            .await
            .unwrap();
        assert_eq!(text, "Hello\n");
        println!("ms {:.3}", begin.elapsed().as_secs_f64() * 1e3);
    }
}
