//! Where programs listen, as the kernel tells it.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Most bytes read of each table: some 3,000 sockets. A program that has more of them is not listening in
/// vain.
const MOST_BYTES: u64 = 512 << 10;

/// The state of a socket that listens (TCP_LISTEN of the kernel's tcp_states.h).
const LISTENS: &str = "0A";

/// The addresses that sockets of this user id listen on with TCP, in the network of this process; `pid`
/// `None`: in this process's own.
pub fn listening(pid: Option<i32>, uid: u32) -> Vec<SocketAddr> {
    let process = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    let mut found: Vec<SocketAddr> = ["tcp", "tcp6"]
        .into_iter()
        .flat_map(|table| {
            // A kernel without IPv6 has one table, and a process that has ended none.
            let text = table_of(&process, table).unwrap_or_default();
            parse(&text, uid)
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn table_of(process: &str, table: &str) -> std::io::Result<String> {
    let mut text = String::new();
    let file = File::open(format!("/proc/{process}/net/{table}"))?;
    file.take(MOST_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// The listening sockets of this user id in a table of proc_net_tcp(5).
fn parse(table: &str, uid: u32) -> Vec<SocketAddr> {
    let one = |line: &str| {
        let mut fields = line.split_whitespace();
        let address = address(fields.nth(1)?)?;
        // After the local address: the remote one, the state, two queues, a timer, a count, the user id.
        let state = fields.nth(1)?;
        let owner: u32 = fields.nth(3)?.parse().ok()?;
        (state == LISTENS && owner == uid).then_some(address)
    };
    table.lines().skip(1).filter_map(one).collect()
}

/// `0100007F:0BB8`: words of four bytes in the machine's order, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let digits = host.get(8 * at..8 * at + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let host = match host.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            IpAddr::from(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(host, port))
}

/// The addresses that a program on this machine's own network is tried at first.
pub const LOCAL: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::net::TcpListener;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1388 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1 0 100 0 0 10 0
   1: 00000000:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0100007F:1388 0100007F:C0DE 01 00000000:00000000 00:00000000 00000000  1000        0 3 1 0 100 0 0 10 0
   3: zz
";

    #[test]
    #[cfg(target_endian = "little")]
    fn a_table_tells_who_listens_where() {
        assert_eq!(parse(TABLE, 1_000), ["127.0.0.1:5000".parse().unwrap()]);
        assert_eq!(parse(TABLE, 0), ["0.0.0.0:3000".parse().unwrap()]);
        let six = "head\n 0: 00000000000000000000000001000000:0BB8 00000000000000000000000000000000:0000 0A 0:0 0:0 0 7 0 1\n";
        assert_eq!(parse(six, 7), ["[::1]:3000".parse().unwrap()]);
        assert!(parse("", 0).is_empty() && address("0100007F").is_none());
    }

    #[test]
    fn this_process_is_found_listening() {
        let own = rustix::process::getuid().as_raw();
        for local in LOCAL {
            let Ok(listener) = TcpListener::bind((local, 0)) else {
                // A machine without IPv6.
                assert!(local.is_ipv6());
                continue;
            };
            let address = listener.local_addr().unwrap();
            let pid = i32::try_from(std::process::id()).unwrap();
            assert!(listening(None, own).contains(&address), "{address}");
            assert!(listening(Some(pid), own).contains(&address), "{address}");
            assert!(!listening(None, own + 1).contains(&address), "{address}");
        }
    }
}
