"""Where a command listens, and the secret without which nobody from elsewhere is let in."""

import ipaddress
import os
import socket
from pathlib import Path

from glm_peft.errors import UserError


def read_secret(file: str | None, flag: str, variable: str) -> str | None:
    """
    Return the secret in a file, or else in an environment variable; `None` where there is neither.

    Raises:
        UserError: the file cannot be read, or nothing is in it.
    """
    if file is None:
        return os.environ.get(variable) or None
    try:
        secret = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {file} cannot be read ({error}): name a file with one line.") from error
    if not secret:
        raise UserError(f"--{flag} {file} is empty: write the secret into it.")
    return secret


def check_host(host: str, secret: str | None, flag: str, variable: str) -> None:
    """Raise a `UserError` where others can reach a host, and no secret keeps them out."""
    if not secret and not is_loopback(host):
        raise UserError(
            f"--host {host} lets others in: give --{flag} FILE or set {variable}, or leave it out for 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Return whether a host is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def bind(host: str, port: int) -> socket.socket:
    """
    Take a port without listening yet, so that nobody connects before there is an answer.

    Raises:
        UserError: it is in use, or the host is not of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}): give another --port."
        ) from None
    return bound


def url_of(listener: socket.socket) -> str:
    """Return the address that a browser on this machine opens."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
