"""Where a command listens, and who can reach it there."""

import errno
import ipaddress
import socket

from glm_peft.errors import UserError


def is_loopback(host: str) -> bool:
    """Return whether a host is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def refuse_unsafe_host(host: str, secret: object, name: str, flag: str, variable: str) -> None:
    """
    Raise a `UserError` where other machines could ask without a secret.

    Args:
        secret: that others must give; `None` for none.
        name: what it is called, such as key.
        flag: that takes its file.
        variable: of the environment that may hold it instead.
    """
    if secret is None and not is_loopback(host):
        raise UserError(
            f"--host {host} can be reached from other machines, and there is no {name}: give {flag}, or set "
            f"{variable}."
        )


def bind(host: str, port: int) -> socket.socket:
    """
    Take a port without listening yet, so that nobody connects before there is an answer.

    Raises:
        UserError: the port is in use, or the host is not of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"--port {port} of {host} is in use: end what listens there, or give another one."
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port} cannot be listened on ({reason}): give others.") from None
    return bound


def url_of(listener: socket.socket) -> str:
    """Return the address that a client on this machine asks."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
