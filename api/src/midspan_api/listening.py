"""Opens the socket that a server listens on, before anything slow is begun."""

from __future__ import annotations

import errno
import ipaddress
import socket
import ssl

from midspan.errors import SettingsError


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet.

    Args:
        host: address or name of an interface of this machine.
        port: 0 takes a free one.

    Raises:
        SettingsError: the address is taken, is not of this machine, or may not be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise SettingsError(
            f"The host {host!r} cannot be resolved: {error.strerror}.",
            remedy="Give --host an address of this machine, such as 127.0.0.1.",
        ) from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _explained(error, host, port) from None
    return listener


def check_certificate(certfile: str, keyfile: str) -> None:
    """Refuse files that TLS cannot be served with.

    Args:
        certfile: PEM file of the certificate.
        keyfile: PEM file of its key.

    Raises:
        SettingsError: one cannot be read, is none, or they do not belong together.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
    except OSError as error:
        raise SettingsError(
            f"TLS cannot be served with {certfile!r} and {keyfile!r}: {error.strerror or error}.",
            remedy="Give PEM files that belong together with --ssl-certfile and --ssl-keyfile.",
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(listener: socket.socket, host: str, *, encrypted: bool) -> str:
    """The address under which this machine reaches the server, without a slash at its end."""
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)
    if ":" in shown and not shown.startswith("["):
        shown = f"[{shown}]"
    return f"{'https' if encrypted else 'http'}://{shown}:{port}"


def _explained(error: OSError, host: str, port: int) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        return SettingsError(
            f"Port {port} on {host} is already in use.",
            remedy="Stop the program that uses it, or take another port with --port.",
        )
    if error.errno == errno.EACCES:
        return SettingsError(f"Port {port} may not be used by this user.", remedy="Take a port above 1023 with --port.")
    if error.errno == errno.EADDRNOTAVAIL:
        return SettingsError(
            f"{host} is no address of this machine.", remedy="Give --host 127.0.0.1, or 0.0.0.0 for all interfaces."
        )
    return SettingsError(f"Cannot listen on {host}:{port}: {error.strerror}.")
