//! Networks: an address and how many of its bits count.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// A network such as `10.0.0.0/8`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

/// Why a text is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no network such as 10.0.0.0/8 and no address")]
pub struct NetworkError(String);

impl Network {
    /// Whether it consists of IPv4 addresses.
    pub fn is_ipv4(self) -> bool {
        self.address.is_ipv4()
    }

    /// Whether the address is one of its.
    pub fn contains(self, address: IpAddr) -> bool {
        let (width, own, other) = match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                (32, own.to_bits().into(), other.to_bits().into())
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => (128, own.to_bits(), other.to_bits()),
            _ => return false,
        };
        let rest = width - u32::from(self.bits);
        // A shift by the whole width is none.
        (own ^ other).checked_shr(rest).unwrap_or(0) == 0
    }
}

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        Self { address, bits }
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    /// Bits that do not count must be zero: the API server warns of them, and often they are a mistake.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || NetworkError(text.to_owned());
        let Some((address, bits)) = text.split_once('/') else {
            return text.parse().map(IpAddr::into).map_err(|_| refused());
        };
        let address: IpAddr = address.parse().map_err(|_| refused())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let digits = bits.bytes().all(|b| b.is_ascii_digit());
        let bits = bits.parse().ok().filter(|bits| digits && *bits <= width);
        let bits: u8 = bits.ok_or_else(refused)?;
        let first = match address {
            IpAddr::V4(address) => u128::from(address.to_bits()),
            IpAddr::V6(address) => address.to_bits(),
        };
        let uncounted = 1_u128
            .checked_shl(u32::from(width - bits))
            .map_or(u128::MAX, |next| next - 1);
        match first & uncounted {
            0 => Ok(Self { address, bits }),
            _ => Err(refused()),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn networks_are_written_as_the_api_server_takes_them() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("fd00::/8", "fd00::/8"),
            ("::/0", "::/0"),
            ("fd00::1", "fd00::1/128"),
        ] {
            assert_eq!(text.parse::<Network>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "/",
            "10.0.0.0/",
            "10.0.0.0/33",
            "10.0.0.0/+8",
            "10.0.0.1/8",
            "fd00::1/64",
            "fd00::/129",
            "a/8",
            "10.0.0.0/8/8",
        ] {
            assert!(text.parse::<Network>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_network_contains_its_first_and_last_address_and_no_other() {
        let inside = |network: &str, address: &str| {
            let network: Network = network.parse().unwrap();
            network.contains(address.parse().unwrap())
        };
        assert!(inside("172.16.0.0/12", "172.16.0.0") && inside("172.16.0.0/12", "172.31.255.255"));
        assert!(
            !inside("172.16.0.0/12", "172.32.0.0") && !inside("172.16.0.0/12", "172.15.255.255")
        );
        assert!(inside("0.0.0.0/0", "255.255.255.255") && inside("::/0", "ffff::1"));
        assert!(!inside("0.0.0.0/0", "::1"), "another family");
        assert!(inside("fe80::/10", "febf::1") && !inside("fe80::/10", "fec0::1"));
        assert!(inside("10.1.2.3", "10.1.2.3") && !inside("10.1.2.3", "10.1.2.2"));
    }
}
