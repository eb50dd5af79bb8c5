//! Runs that try to poison the next one, or to take what others need.
