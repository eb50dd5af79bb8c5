//! Who may read and write what in the code store, and what the cluster lets Gantry do.
