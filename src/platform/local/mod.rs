//! The local platform: sandboxed processes on one Linux machine.
