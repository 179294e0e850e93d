"""Requests to the API, with the standard library."""

import base64
import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = ["BASE", "Client", "CtlError", "FieldsError", "UsageError"]

BASE = "/api/v1.0/"
TIMEOUT_S = 600.0
"""Allocating an extent in full may take its time; the connection itself is made or refused sooner."""
CONNECT_TIMEOUT_S = 10.0


class CtlError(Exception):
    """What was asked did not happen."""

    exit_status = 1

    def lines(self) -> list[str]:
        """What the operator reads."""
        return [str(self)]


class UsageError(CtlError):
    """It cannot be asked like that."""

    exit_status = 2


class FieldsError(CtlError):
    """Fields are wrong: messages by wire name."""

    def __init__(self, errors: Mapping[str, list[str]], names: Mapping[str, str] | None = None) -> None:
        """``names``: wire name → what the operator calls the field."""
        self.errors = errors
        self.names = names or {}
        super().__init__("; ".join(self.lines()))

    def lines(self) -> list[str]:
        """One line a message, with the field's name before it."""
        return [
            message if wire == "__all__" else f"{self.names.get(wire, wire)}: {message}"
            for wire, messages in self.errors.items()
            for message in messages
        ]


class Client:
    """One connection to one daemon, kept open between requests."""

    def __init__(self, url: str, user: str, password: str, ca_file: Path | None = None) -> None:
        """
        Args:
            url: ``http://HOST[:PORT]`` or ``https://…``; a path before ``/api`` is kept.
            ca_file: certificates (PEM) to trust instead of the system's.

        Raises:
            UsageError: the URL is none, or the file cannot be used.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"--url: {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise UsageError(f"--url: {url!r} is not http://HOST:PORT or https://HOST:PORT")
        self.url = url.rstrip("/")
        self._base = parts.path.rstrip("/") + BASE
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=ca_file)
            except OSError as error:
                raise UsageError(f"--ca-file: cannot use {ca_file}: {error.strerror or error}") from None
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port or 443, timeout=CONNECT_TIMEOUT_S, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(host, port or 8260, timeout=CONNECT_TIMEOUT_S)
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}", "Accept": "application/json"}
        self.user = user

    def get(self, path: str) -> Any:
        """The body of a GET; None when there is no such thing."""
        return self.request("GET", path, missing=True)

    def all(self, path: str) -> list[dict[str, Any]]:
        """A whole collection."""
        found = self.request("GET", f"{path}/?limit=0")
        if not isinstance(found, list):
            raise CtlError(f"{self.url} answers {path} with no list; is this iscsi-targetd?")
        return found

    def events(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Kind and data of server-sent events as they come, until the daemon ends the stream.

        Raises:
            CtlError: it cannot be had.
        """
        try:
            self._connection.request("GET", self._base + path, headers=self._headers)
            response = self._connection.getresponse()
            if response.status != 200:
                raise self._failure("GET", path, response.status, response.read(), response.reason)
            kind = ""
            for raw in response:
                name, _, value = raw.decode().rstrip("\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)
        except (OSError, http.client.HTTPException) as error:
            raise CtlError(f"cannot reach {self.url}: {error}") from None

    def request(self, method: str, path: str, body: Any = None, *, missing: bool = False) -> Any:
        """One request; the decoded body of the answer.

        Args:
            path: below ``/api/v1.0/``.
            missing: answer None for a 404 instead of failing.

        Raises:
            FieldsError: fields are wrong.
            CtlError: anything else went wrong.
        """
        status, raw, reason = self._exchange(method, path, body)
        if status == 404 and missing:
            return None
        if status < 300:
            return _decoded(raw)
        raise self._failure(method, path, status, raw, reason)

    def _failure(self, method: str, path: str, status: int, raw: bytes, reason: str) -> CtlError:
        """What an answer means that is not the one hoped for."""
        answer = _decoded(raw)
        if status == 401:
            return CtlError(f"{self.url} does not accept the password of {self.user!r}")
        if status == 404:
            return CtlError(f"there is no {path.strip('/')}")
        if isinstance(answer, dict):
            if status in (400, 409) and answer and all(isinstance(text, list) for text in answer.values()):
                return FieldsError(answer)
            text = answer.get("error_message") or answer.get("error")
            if text:
                return CtlError(str(text))
        return CtlError(f"{method} {path} failed: {status} {reason}")

    def _exchange(self, method: str, path: str, body: Any) -> tuple[int, bytes, str]:
        headers = dict(self._headers)
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        for last in (False, True):
            kept = self._connection.sock is not None
            try:
                if not kept:
                    self._connection.connect()
                    self._connection.sock.settimeout(TIMEOUT_S)
                self._connection.request(method, self._base + path, data, headers)
                response = self._connection.getresponse()
                return response.status, response.read(), response.reason
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
                self._connection.close()
                # A kept connection may have been closed meanwhile. A write is not repeated: it may have
                # been carried out before the connection went.
                if last or not kept or method != "GET":
                    raise CtlError(f"{self.url} closed the connection: {error}") from None
            except ssl.SSLCertVerificationError as error:
                raise CtlError(
                    f"{self.url}: {error.verify_message} (--ca-file names what to trust)"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                text = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise CtlError(f"cannot reach {self.url}: {text}") from None
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _decoded(raw: bytes) -> Any:
    """The JSON of a body; None if it is none."""
    try:
        return json.loads(raw) if raw else None
    except ValueError:
        return None
