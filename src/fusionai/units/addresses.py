"""Addresses as people write them: "host:port", and "[v6]:port" for IPv6."""

from __future__ import annotations

from fusionai.errors import ConfigError


def join_address(host: str, port: int) -> str:
    """Return "host:port", with brackets round an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port".

    Raises:
        ConfigError: the text is not of that form.
    """
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"address {address!r} is not of the form host:port (an IPv6 host in brackets)")
    return host, int(port)
