"""A Unix stream socket that carries messages, and descriptors with them. Never waits.

Each message is preceded by its length. A descriptor travels with the first byte of the message it belongs
to; the kernel never joins the bytes behind it with those before (unix(7), SCM_RIGHTS), so descriptors come
out in the order of the messages that have one.
"""

import asyncio
import logging
import os
import pickle
import socket
from collections import deque
from collections.abc import Callable
from struct import Struct

from targetd.workers.messages import Adopt, decode, encode

__all__ = ["Link"]

log = logging.getLogger("targetd.workers")

_LENGTH = Struct("!I")
CHUNK = 256 * 1024
"""Bytes read at once."""
MAX_DESCRIPTORS = 64
"""That one read may bring; the kernel gives those of one message at a time."""


class Link:
    """One end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        received: Callable[[object, int], None],
        lost: Callable[[], None],
    ) -> None:
        """
        Args:
            received: called with each message, and the descriptor that came with it, else -1.
            lost: called once, when the other end is gone or cannot be understood.
        """
        sock.setblocking(False)
        self._loop = loop
        self._sock = sock
        self._received = received
        self._lost = lost
        self._in = bytearray()
        self._descriptors: deque[int] = deque()
        self._out: deque[tuple[memoryview, int]] = deque()
        """(what is still to be sent, the descriptor that goes with its first byte or -1)"""
        self.closed = False
        loop.add_reader(sock.fileno(), self._readable)

    def send(self, message: object, descriptor: int = -1) -> None:
        """Send a message; the descriptor is closed here when it is on its way, or never will be."""
        if self.closed:
            if descriptor >= 0:
                os.close(descriptor)
            return
        data = encode(message)
        was_empty = not self._out
        self._out.append((memoryview(_LENGTH.pack(len(data)) + data), descriptor))
        if was_empty:
            self._writable()

    def _writable(self) -> None:
        out = self._out
        while out:
            data, descriptor = out[0]
            try:
                if descriptor >= 0:
                    sent = socket.send_fds(self._sock, [data], [descriptor])
                else:
                    sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._sock.fileno(), self._writable)
                return
            except OSError:
                self.close()
                return
            if descriptor >= 0:
                os.close(descriptor)
            if sent < len(data):
                out[0] = (data[sent:], -1)
            else:
                out.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, CHUNK, MAX_DESCRIPTORS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors += descriptors
        if not data:
            self.close()
            return
        self._in += data
        try:
            self._take()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError):
            log.exception("a message between processes cannot be understood")
            self.close()

    def _take(self) -> None:
        buffer = self._in
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            end = at + _LENGTH.size + length
            if len(buffer) < end:
                break
            message = decode(buffer[at + _LENGTH.size : end])
            at = end
            descriptor = self._descriptors.popleft() if isinstance(message, Adopt) else -1
            self._received(message, descriptor)
            if self.closed:
                return
        del buffer[:at]

    def close(self) -> None:
        """Nothing more is sent or received."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for descriptor in (*self._descriptors, *(each for _, each in self._out if each >= 0)):
            os.close(descriptor)
        self._descriptors.clear()
        self._out.clear()
        self._lost()
