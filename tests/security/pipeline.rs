//! Crashes, crash loops and queues that one user fills.
