"""Writes of small objects over plain kept connections.

For an object of 20 KB, urllib3 spends more processor time than the server. A small write needs little of HTTP:
one send, and one answer without a body. Whatever is not that is left to the general way, which asks again.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

_MOST_HEADER_BYTES = 16 * 1024


class QuickPut:
    """Sends PUTs to one server without TLS; safe to share between threads."""

    def __init__(self, host: str, port: int, *, connect_seconds: float, read_seconds: float) -> None:
        self._address = (host, port)
        self._connect_seconds = connect_seconds
        self._read_seconds = read_seconds
        self._idle: deque[socket.socket] = deque()

    def put(self, target: str, headers: Mapping[str, str], body: bytes) -> str | None:
        """Send one PUT.

        Returns:
            The object's ETag; None when it may or may not have been written, for whatever reason.
        """
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"PUT {target} HTTP/1.1\r\n{lines}content-length: {len(body)}\r\n\r\n".encode()
        connection: socket.socket | None = None
        try:
            with suppress(IndexError):
                connection = self._idle.pop()
            connection = connection or self._connect()
            connection.sendall(head + body)
            etag = self._read_etag(connection)
        except OSError:
            etag = None
        if connection is not None:
            if etag is None:
                connection.close()
            else:
                self._idle.append(connection)
        return etag

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=self._connect_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(self._read_seconds)
        return connection

    def _read_etag(self, connection: socket.socket) -> str | None:
        """The ETag of a good answer without a body; None for any other, after which the connection is of no use."""
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            part = connection.recv(_MOST_HEADER_BYTES)
            if not part or len(answer) > _MOST_HEADER_BYTES:
                return None
            answer += part
        status, *lines = answer[:-4].split(b"\r\n")
        if not status.startswith(b"HTTP/1.1 200"):
            return None
        fields = {}
        for line in lines:
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip()
        if fields.get(b"content-length") != b"0" or fields.get(b"connection", b"").lower() == b"close":
            return None
        return fields.get(b"etag", b"").decode().strip('"') or None
