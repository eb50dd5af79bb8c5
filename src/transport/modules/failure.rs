//! What went wrong with a module, as HTTP says it: one row for each way.

use axum::http::StatusCode;
use serde_json::json;

use crate::model::{ModuleName, Problem};
use crate::pipeline::modules::{Failure, Kind, ModuleError};
use crate::transport::problem::HttpProblem;

/// Told for this module, and for the function that was called.
pub fn told(error: ModuleError, module: &ModuleName, method: Option<&str>) -> HttpProblem {
    match error {
        ModuleError::NoPod => no_pod(module),
        ModuleError::Failed(failure) => failed(&failure, module, method),
        ModuleError::Refused(problem) => {
            HttpProblem::new(StatusCode::UNPROCESSABLE_ENTITY, problem)
        }
        ModuleError::Unavailable(problem) => HttpProblem::unavailable(problem),
        ModuleError::TooMany(most) => HttpProblem::new(
            StatusCode::TOO_MANY_REQUESTS,
            Problem::new(
                "too_many_calls",
                "Too many calls at one time",
                format!("{most} calls of this user's are under way already"),
                "Ask again when one of them has ended; GANTRY_MAX_CALLS has the bound",
            ),
        )
        .retry_after(1),
        ModuleError::Late(after) => HttpProblem::new(
            StatusCode::GATEWAY_TIMEOUT,
            Problem::new(
                "call_timeout",
                format!("{module} did not answer"),
                format!("no answer within {} ms", after.as_millis()),
                "Ask again; GET /modules tells how its pod is",
            ),
        ),
    }
}

/// What no single module is about.
pub fn platform(error: ModuleError) -> HttpProblem {
    match error {
        ModuleError::Unavailable(problem) | ModuleError::Refused(problem) => {
            HttpProblem::unavailable(problem)
        }
        other => HttpProblem::internal(other.to_string()),
    }
}

/// There is no pod of it, or none that this caller may see.
pub fn no_pod(module: &ModuleName) -> HttpProblem {
    HttpProblem::new(
        StatusCode::NOT_FOUND,
        Problem::new(
            "module_not_found",
            format!("There is no pod of the module {module}"),
            format!("no module {module} of yours is served"),
            format!("Create it with POST /create_pod/{module}; GET /modules lists what is there"),
        ),
    )
}

struct Row {
    status: StatusCode,
    code: &'static str,
    message: String,
    remedy: &'static str,
}

fn row(kind: Kind, module: &ModuleName, called: &str) -> Row {
    const SHOWN: &str = "GET /modules/{module} shows what can be called";
    let (status, code, message, remedy) = match kind {
        Kind::MethodNotFound => (
            404,
            "method_not_found",
            format!("{called} does not exist"),
            SHOWN,
        ),
        Kind::MethodPrivate => (403, "method_private", format!("{called} is private"), SHOWN),
        Kind::MethodNotCallable => (
            422,
            "method_not_callable",
            format!("{called} cannot be called"),
            SHOWN,
        ),
        Kind::ArgumentsWrong => (
            422,
            "arguments_wrong",
            format!("{called} cannot be called with these arguments"),
            "Send args and kwargs that fit the signature",
        ),
        Kind::Raised => (
            422,
            "function_raised",
            format!("{called} raised an exception"),
            "The traceback shows where; mend the arguments or the module",
        ),
        Kind::ResultNotJson => (
            422,
            "result_not_json",
            format!("The result of {called} cannot be sent as JSON"),
            "Call a function that returns values JSON can hold; README.md lists those that are converted",
        ),
        Kind::ResultTooLarge => (
            422,
            "result_too_large",
            format!("The result of {called} is too large"),
            "Return less, or part by part from a generator, with Accept: text/event-stream",
        ),
        Kind::Deadline => (
            504,
            "call_timeout",
            format!("{called} took too long"),
            "Give it more time with timeout_ms, at most 60000, or have it do less; the module takes the next call",
        ),
        Kind::Crashed => (
            422,
            "call_crashed",
            format!("{called} ended its process"),
            "Mend the function or the arguments; the module takes the next call",
        ),
        Kind::OutOfMemory => (
            422,
            "call_out_of_memory",
            format!("{called} needed more memory than a call may use"),
            "Have it do less at a time; the module takes the next call",
        ),
        Kind::Busy => (
            503,
            "module_busy",
            format!("{module} is busy"),
            "Ask again in a moment, or give it more replicas",
        ),
        Kind::ModuleNotFound => (
            404,
            "module_not_found",
            format!("There is no Python module {module}"),
            "Check its name, or name the package that has it: {\"packages\":[\"name==version\"]}",
        ),
        Kind::ModuleBroken => (
            422,
            "module_broken",
            format!("The module {module} cannot be imported"),
            "The traceback shows where; it may need other packages",
        ),
        Kind::Unspecified => (
            503,
            "module_unavailable",
            format!("{called} failed for a reason this server does not know"),
            "Remove the module's pod and create it again: it may run another version",
        ),
    };
    Row {
        status: StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        code,
        message,
        remedy,
    }
}

fn failed(failure: &Failure, module: &ModuleName, method: Option<&str>) -> HttpProblem {
    let kind = Kind::try_from(failure.kind).unwrap_or(Kind::Unspecified);
    let method: Option<String> = method.map(|method| method.chars().take(200).collect());
    let called = match method.as_deref() {
        None | Some("") => module.to_string(),
        Some(method) => format!("{module}.{method}"),
    };
    let row = row(kind, module, &called);
    let cause = match (kind, failure.message.as_str()) {
        (Kind::Raised | Kind::ModuleBroken, "") => failure.r#type.clone(),
        (Kind::Raised, message) => format!("{}: {message}", failure.r#type),
        (_, message) => message.to_owned(),
    };
    let problem = Problem::new(row.code, row.message, cause, row.remedy);
    let mut told = HttpProblem::new(row.status, problem);
    if kind == Kind::Busy {
        told = told.retry_after(1);
    }
    if !failure.r#type.is_empty() {
        // `type` itself is the problem's own (RFC 9457).
        let exception = json!({
            "type": failure.r#type,
            "message": failure.message,
            "traceback": failure.traceback,
        });
        told = told.with("exception", exception);
    }
    if !failure.output.is_empty() {
        told = told.with("output", failure.output.as_str().into());
    }
    told
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_kind_of_failure_has_a_status_and_says_what_to_do() {
        let module: ModuleName = "math".parse().unwrap();
        let mut codes = std::collections::BTreeSet::new();
        for kind in 0..=13 {
            let failure = Failure {
                kind,
                r#type: "ValueError".to_owned(),
                message: "why".to_owned(),
                ..Failure::default()
            };
            let told = failed(&failure, &module, Some("sqrt"));
            assert!(told.status().is_client_error() || told.status().is_server_error());
            assert!(told.problem().cause.contains("why"), "{kind}");
            assert!(!told.problem().remediation.is_empty());
            codes.insert(told.problem().code.clone());
        }
        assert_eq!(codes.len(), 14, "{codes:?}");
    }
}
