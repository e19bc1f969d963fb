"""No URL leads to a private place: which network addresses may be connected to.

The check is made where the socket is made, on the very address that is then connected to. So it
holds for every spelling of an address, every redirect, and a name that resolves to one address
when it is looked at and to another when it is used.
"""

from __future__ import annotations

import ipaddress
import socket
from collections import Counter
from collections.abc import Iterator

from aiohttp import ThreadedResolver
from aiohttp.abc import ResolveResult

# Public by their number, yet answered inside a cloud: Azure's host agent.
_CLOUD_ADDRESSES = frozenset([ipaddress.ip_address("168.63.129.16")])
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Not everywhere in the tables of Python's own: protocol assignments (a cloud's metadata service is
# among them) and relays of 6to4.
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))
_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that has been given out

_MOST = 8  # addresses of each family that are tried

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class BlockedAddressError(OSError):
    """Raised in place of a connection to an address that is not of the public internet."""


def is_public(text: str) -> bool:
    """True for an address of the public internet; False for loopback, private, link-local,
    shared, multicast and reserved ones, for a cloud's metadata services, and for IPv6 addresses
    that carry such an IPv4 address (mapped, compatible, 6to4, Teredo, NAT64).
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    return all(_is_public(inner) for inner in (*_embedded(address), address))


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (address in _NAT64 or address.ipv4_mapped):
        return True  # a mere wrapping: what is embedded decides
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
    """A socket for one `getaddrinfo` result; BlockedAddressError where it is not public."""
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise BlockedAddressError(f"blocked address {address[0]}")
    return socket.socket(family, kind, protocol)


def odd_spelling(host: str) -> bool:
    """True for an IPv4 address that is not written as four decimals: 2130706433, 0x7f.1, 010.0.0.1.

    Clients disagree on what these mean, and only mischief writes them.
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
    """True for a host that is private as it is written, without a look-up: an address that is not
    public, one in an odd spelling, or localhost (RFC 6761).
    """
    if host == "localhost" or host.endswith(".localhost") or odd_spelling(host):
        return True
    try:
        return not is_public(host)
    except ValueError:
        return False


class Resolver(ThreadedResolver):
    """The system's answers, of which no name has more than a few.

    An answer has room for thousands of addresses, and the time that it takes to look at them all
    is that of every other download.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Raises OSError for a name without an address."""
        found = await super().resolve(host, port, family)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        seen: Counter[int] = Counter()
        few = []
        for result in found:
            seen[result["family"]] += 1
            if seen[result["family"]] <= _MOST:
                few.append(result)
        return few
