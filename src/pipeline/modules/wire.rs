//! The messages of `runner-image/module_service.proto`, and of the standard health service. Written by hand,
//! so that no protoc is needed; the tests speak to the real server with them.

use bytes::Bytes;

/// `gantry.module.v1.CallRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CallRequest {
    #[prost(string, tag = "1")]
    pub method: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub args: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub kwargs: Bytes,
    #[prost(uint32, tag = "4")]
    pub timeout_ms: u32,
}

/// `gantry.module.v1.CallReply`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CallReply {
    #[prost(oneof = "CallOutcome", tags = "1, 2")]
    pub outcome: Option<CallOutcome>,
    #[prost(string, tag = "3")]
    pub called_with: String,
}

/// What a call came to.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum CallOutcome {
    #[prost(bytes = "bytes", tag = "1")]
    Result(Bytes),
    #[prost(message, tag = "2")]
    Failure(Failure),
}

/// `gantry.module.v1.Failure`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failure {
    #[prost(enumeration = "Kind", tag = "1")]
    pub kind: i32,
    #[prost(string, tag = "2")]
    pub r#type: String,
    #[prost(string, tag = "3")]
    pub message: String,
    #[prost(string, tag = "4")]
    pub traceback: String,
    #[prost(string, tag = "5")]
    pub output: String,
}

/// `gantry.module.v1.Kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    Unspecified = 0,
    MethodNotFound = 1,
    MethodPrivate = 2,
    MethodNotCallable = 3,
    ArgumentsWrong = 4,
    Raised = 5,
    ResultNotJson = 6,
    ResultTooLarge = 7,
    Deadline = 8,
    Crashed = 9,
    OutOfMemory = 10,
    Busy = 11,
    ModuleNotFound = 12,
    ModuleBroken = 13,
}

/// `gantry.module.v1.StreamEvent`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StreamEvent {
    #[prost(oneof = "StreamPart", tags = "1, 2, 3")]
    pub event: Option<StreamPart>,
}

/// One event of a stream.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum StreamPart {
    #[prost(bytes = "bytes", tag = "1")]
    Item(Bytes),
    #[prost(message, tag = "2")]
    Output(Output),
    #[prost(message, tag = "3")]
    End(CallReply),
}

/// `gantry.module.v1.Output`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Output {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub data: Bytes,
}

/// `gantry.module.v1.DescribeRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DescribeRequest {
    #[prost(string, tag = "1")]
    pub namespace: String,
}

/// `gantry.module.v1.Description`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Description {
    #[prost(string, tag = "1")]
    pub module: String,
    #[prost(string, tag = "2")]
    pub version: String,
    #[prost(string, tag = "3")]
    pub doc: String,
    #[prost(message, repeated, tag = "4")]
    pub functions: Vec<Function>,
    #[prost(string, repeated, tag = "5")]
    pub namespaces: Vec<String>,
    #[prost(bool, tag = "6")]
    pub truncated: bool,
    #[prost(message, optional, tag = "7")]
    pub failure: Option<Failure>,
}

/// `gantry.module.v1.Function`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Function {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub signature: String,
    #[prost(string, tag = "3")]
    pub doc: String,
    #[prost(bool, tag = "4")]
    pub is_class: bool,
}
