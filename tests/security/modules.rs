//! Packages and modules that try to run code with rights that are not theirs.
