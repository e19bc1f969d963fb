"""Which network addresses may be connected to: no URL may reach a private network.

The check is made when the socket is created, on the address that it connects to. So it covers every
spelling of an address, every redirect, and a name that resolves to another address each time.
"""

from __future__ import annotations

import ipaddress
import socket
from collections import Counter
from collections.abc import Iterator

from aiohttp import ThreadedResolver
from aiohttp.abc import ResolveResult

# Azure's host agent: a public address that is answered inside the cloud.
_CLOUD_ADDRESSES = frozenset([ipaddress.ip_address("168.63.129.16")])
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Missing from the tables of some Python versions: protocol assignments (one is a cloud's metadata
# service) and 6to4 relays.
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))
_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that has been assigned

_MAX_ADDRESSES = 8  # per family and name

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class BlockedAddressError(OSError):
    """Raised instead of a connection to an address outside the public internet."""


def is_public(text: str) -> bool:
    """True for an address of the public internet; False for loopback, private, link-local,
    shared, multicast and reserved ones, for a cloud's metadata services, and for IPv6 addresses
    that carry such an IPv4 address (mapped, compatible, 6to4, Teredo, NAT64).
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    return all(_is_public(inner) for inner in (*_embedded(address), address))


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (address in _NAT64 or address.ipv4_mapped):
        return True  # only a wrapper: the embedded address decides
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and address not in _CLOUD_ADDRESSES
        and not any(address in network for network in _SPECIAL)
        and (address.version == 4 or address in _UNICAST)
    )


def _embedded(address: Address) -> Iterator[ipaddress.IPv4Address]:
    if isinstance(address, ipaddress.IPv4Address):
        return
    if address.ipv4_mapped:
        yield address.ipv4_mapped
    if address.sixtofour:
        yield address.sixtofour
    if address.teredo:
        yield from address.teredo
    if address in _NAT64:
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def public_socket(
    info: tuple[int, int, int, str, tuple[str | int, ...]],
) -> socket.socket:
    """A socket for one `getaddrinfo` result. Raises BlockedAddressError if it is not public."""
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise BlockedAddressError(f"blocked address {address[0]}")
    return socket.socket(family, kind, protocol)


def is_nonstandard_ipv4(host: str) -> bool:
    """True for an IPv4 address that is not written as four decimals: 2130706433, 0x7f.1, 010.0.0.1.

    Clients disagree on their meaning, and only attackers use them.
    """
    try:
        socket.inet_aton(host)
    except OSError:
        return False
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return True
    return False


def is_private_name(host: str) -> bool:
    """True for a host that is private without a DNS look-up: an address that is not public, an IPv4
    address in a nonstandard spelling, or localhost (RFC 6761).
    """
    if host == "localhost" or host.endswith(".localhost") or is_nonstandard_ipv4(host):
        return True
    try:
        return not is_public(host)
    except ValueError:
        return False


class Resolver(ThreadedResolver):
    """The system's resolver, with a limit on the addresses of a name.

    A DNS response may have thousands of addresses; handling them would delay all other downloads.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Raises OSError for a name without an address."""
        results = await super().resolve(host, port, family)
        if not results:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        counts: Counter[int] = Counter()
        kept = []
        for result in results:
            counts[result["family"]] += 1
            if counts[result["family"]] <= _MAX_ADDRESSES:
                kept.append(result)
        return kept
