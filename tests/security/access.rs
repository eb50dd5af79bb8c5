//! One user against all through keys, sessions, names, cookies and connections.
