//! What sockets hold in the kernel's memory, where it counts for nobody.
//!
//! Memory of connections and of Unix sockets counts for the sandbox's control group. Replies of netlink sockets
//! and the queues of errors and time stamps do not: a socket may hold its receive buffer's size of them.

use std::fs::File;
use std::io::Read;

use super::confine::OPEN_FILES;

/// Sockets of a network that are not looked at more closely: what two processes can have open.
const FREE_SOCKETS: u64 = 2 * OPEN_FILES;

/// What each of those above them counts for: the size of a receive buffer (net.core.rmem_default), which user
/// code cannot raise.
const RECEIVE_BUFFER: u64 = 212_992;

/// Most bytes read of a table: some 8,000 sockets, more than are let be.
const MOST_BYTES: u64 = 1 << 20;

/// What the sockets in this process's network hold beside what is counted elsewhere.
pub fn held(pid: i32) -> u64 {
    let table = |name| {
        let mut text = String::new();
        let file = File::open(format!("/proc/{pid}/net/{name}")).ok()?;
        file.take(MOST_BYTES).read_to_string(&mut text).ok()?;
        Some(text)
    };
    // A process that has ended has no tables.
    let unread = table("netlink").map_or(0, |text| unread(&text));
    let sockets = table("sockstat").and_then(|text| sockets(&text));
    unread + sockets.unwrap_or(0).saturating_sub(FREE_SOCKETS) * RECEIVE_BUFFER
}

/// Bytes of replies that were not read, of all sockets in /proc/net/netlink.
fn unread(table: &str) -> u64 {
    let of_one = |line: &str| line.split_whitespace().nth(4)?.parse::<u64>().ok();
    table.lines().skip(1).filter_map(of_one).sum()
}

/// The number of sockets of any kind, from the first line of /proc/net/sockstat.
fn sockets(table: &str) -> Option<u64> {
    let first = table.lines().next()?;
    first.strip_prefix("sockets: used ")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let table = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
            0000000014c6a0b8 0   0          00000000 0        0        0     2        0        5       \n\
            0000000014c6a0b9 0   4242       00000000 209664   0        0     2        12       77      \n\
            0000000014c6a0c0 0   4243       00000000 2304     0        0     2        0        78      \n";
        assert_eq!(unread(table), 211_968);
        assert_eq!(
            sockets("sockets: used 296\nTCP: inuse 17 orphan 0\n"),
            Some(296)
        );
        assert_eq!(sockets(""), None);
    }

    #[test]
    fn an_own_socket_is_among_them() {
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let _socket = std::net::UdpSocket::bind("127.0.0.1:0");
        let text = std::fs::read_to_string(format!("/proc/{own}/net/sockstat"));
        assert!(text.ok().and_then(|text| sockets(&text)) > Some(0));
    }
}
