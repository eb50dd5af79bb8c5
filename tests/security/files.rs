//! Files that user code puts in the way of the server, and disks that it fills.
