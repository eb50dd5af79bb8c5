//! The page that stands in for a program that does not answer.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Response, StatusCode, header};

use super::app::{PROGRAM_PORT, State, describe};
use crate::model::Ending;

/// The page for this state. `output` is what the program wrote: everybody may see that of a script which
/// ended well, since that is all it has to show. Anything else is its owner's: a program's log may hold what
/// nobody else must know.
pub(super) fn page(state: &State, output: &[u8], for_owner: bool) -> Response<Full<Bytes>> {
    let (status, title) = match state {
        State::Ended(Ending::Exited(0)) => (
            StatusCode::OK,
            "The program ended with exit code 0".to_owned(),
        ),
        State::Ended(ending) if for_owner => (
            StatusCode::BAD_GATEWAY,
            format!("The program {}", describe(ending)),
        ),
        State::Ended(_) => (
            StatusCode::BAD_GATEWAY,
            "The program is not available".to_owned(),
        ),
        State::Starting => (
            StatusCode::SERVICE_UNAVAILABLE,
            "The program is starting".to_owned(),
        ),
        State::Serving => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("The program is running and does not listen on port {PROGRAM_PORT}"),
        ),
    };
    let shown = for_owner || status == StatusCode::OK;
    let content = match shown {
        true => format!("<pre>{}</pre>", escape(&String::from_utf8_lossy(output))),
        false => "<p>Its owner finds the reason in its log.</p>".to_owned(),
    };
    let again = status == StatusCode::SERVICE_UNAVAILABLE;
    let refresh = if again {
        "<meta http-equiv=refresh content=1>"
    } else {
        ""
    };
    let title = escape(&title);
    let html = format!(
        "<!doctype html><html lang=en><meta charset=utf-8>{refresh}\
         <meta name=viewport content='width=device-width'><meta name=color-scheme content='light dark'>\
         <title>{title}</title><style>body{{font:16px system-ui;margin:3rem auto;max-width:60rem;padding:0 1rem}}\
         pre{{font:14px/1.5 ui-monospace,monospace;padding:1rem;border:1px solid #8884;border-radius:8px;\
         white-space:pre-wrap;overflow-wrap:anywhere}}</style><h1>{title}</h1>{content}"
    );
    let mut response = Response::new(Full::new(Bytes::from(html)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    let html = header::HeaderValue::from_static("text/html; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, html);
    let no_store = header::HeaderValue::from_static("no-store");
    headers.insert(header::CACHE_CONTROL, no_store);
    // The owner's ticket is in the page's URL.
    let no_referrer = header::HeaderValue::from_static("no-referrer");
    headers.insert(header::REFERRER_POLICY, no_referrer);
    if again {
        headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    response
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use http_body_util::BodyExt;

    async fn shown(state: State, for_owner: bool) -> (u16, String) {
        let response = page(&state, b"token=<secret>", for_owner);
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn only_its_owner_sees_what_a_program_wrote_that_did_not_end_well() {
        let states = [
            (State::Starting, 503),
            (State::Serving, 503),
            (State::Ended(Ending::Exited(1)), 502),
            (State::Ended(Ending::Signalled(9)), 502),
            (State::Ended(Ending::NotStarted("secret".to_owned())), 502),
        ];
        for (state, expected) in states {
            let (status, body) = shown(state.clone(), false).await;
            assert_eq!(status, expected, "{state:?}");
            assert!(!body.contains("secret"), "{state:?}: {body}");
            let (status, body) = shown(state, true).await;
            assert_eq!(status, expected);
            assert!(body.contains("token=&lt;secret&gt;"), "{body}");
        }
        let (status, body) = shown(State::Ended(Ending::Exited(0)), false).await;
        assert!(status == 200 && body.contains("token=&lt;secret&gt;"));
    }
}
