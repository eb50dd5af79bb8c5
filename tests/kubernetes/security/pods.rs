//! What runs inside pods, and what the server does for it.
