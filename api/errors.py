"""From exceptions to answers: the one place that knows status and body of what went wrong.

    FieldsError        409  {"<field>": ["message", …], "__all__": [...]}   every message, by wire name
    BadRequestError         400  {"error": "text"}            malformed: JSON, paging, sorting
    OperationFailedError    400  {"error_message": "text"}    understood, but it could not be done
    ForbiddenError          403  {"error": "text"}            a read-only user writes
    NotFoundError           404  empty                        clients tell "gone" by a body that is no JSON
    MethodNotAllowedError   405  empty, Allow
    BusyError           503  {"error": "text"}, Retry-After
    StoreError          507, 500  {"error_message": "text"}   no room to store a change; it failed otherwise
    TooManyFailuresError    429  {"error": "text"}, Retry-After
    anything else      500  {"error_message": "text"}    a bug: logged with traceback, told nothing of it

(api-semantics §2.1.) 409 rather than 400, since clients take 409 for "already there, look it up".
"""

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from aiohttp import web

from targetd.persistence.interface import StoreError

__all__ = [
    "BadRequestError",
    "BusyError",
    "FieldsError",
    "ForbiddenError",
    "MethodNotAllowedError",
    "NotFoundError",
    "OperationFailedError",
    "TooManyFailuresError",
    "UnauthorizedError",
    "answer",
    "translate_errors",
]

log = logging.getLogger("api")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ApiError(Exception):
    """An answer that is not the one hoped for."""

    status = 500

    def body(self) -> Any:
        """What is sent as JSON; None = nothing."""
        return None

    def headers(self) -> dict[str, str]:
        """What is sent besides."""
        return {}


class FieldsError(ApiError):
    """What is wrong with a body: wire name → messages; ``__all__`` for what concerns no single field."""

    status = 409

    def __init__(self, errors: Mapping[str, Iterable[str]]) -> None:
        super().__init__(", ".join(errors))
        self.errors = {name: list(messages) for name, messages in errors.items()}

    def body(self) -> Any:
        return self.errors


class BadRequestError(ApiError):
    """Not understood."""

    status = 400
    key = "error"

    def body(self) -> Any:
        return {self.key: str(self)}


class UnsupportedFormatError(BadRequestError):
    """A body that is not JSON by its own account."""

    key = "error_message"


class OperationFailedError(BadRequestError):
    """Understood and valid, and yet it could not be carried out; nothing has changed."""

    key = "error_message"


class TooLargeError(BadRequestError):
    """More than the API reads."""

    status = 413


class ForbiddenError(BadRequestError):
    """This user may not."""

    status = 403


class NotFoundError(ApiError):
    """There is no such thing."""

    status = 404


class MethodNotAllowedError(ApiError):
    """The thing is there, and this cannot be done with it."""

    status = 405

    def __init__(self, allowed: str) -> None:
        super().__init__(allowed)
        self.allowed = allowed

    def headers(self) -> dict[str, str]:
        return {"Allow": self.allowed}


class UnauthorizedError(ApiError):
    """Who is asking? Sent before anything is said about the URL or the method."""

    status = 401

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": 'Basic Realm="iscsi-targetd"'}


class TooManyFailuresError(BadRequestError):
    """This address has guessed too often."""

    status = 429

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("Too many failed logins from this address.")
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)}


class BusyError(BadRequestError):
    """Too many want the same at once; in a moment they do not."""

    status = 503

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


def answer(status: int, body: Any = None, headers: Mapping[str, str] | None = None) -> web.Response:
    """An answer with a JSON body, or with none at all if that is None."""
    if body is None:
        return web.Response(status=status, headers=headers)
    text = json.dumps(body).encode()
    return web.Response(status=status, body=text, content_type="application/json", headers=headers)


@web.middleware
async def translate_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever is raised into the answer above."""
    try:
        return await handler(request)
    except ApiError as error:
        return answer(error.status, error.body(), error.headers())
    except web.HTTPRequestEntityTooLarge as error:
        return answer(
            413, {"error": f"The request body is larger than {error.headers.get('X-Limit', 'the limit')}."}
        )
    except web.HTTPException as error:
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return answer(error.status, None, allow)
    except (web.RequestPayloadError, ConnectionError):
        return answer(400, {"error": "The request body ended early."})
    except StoreError as error:
        log.error("%s %s: the change was not stored: %s", request.method, request.path, error)
        return answer(507 if error.full else 500, {"error_message": f"Nothing was changed: {error}."})
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        message = "Sorry, this request could not be processed. Please try again later."
        return answer(500, {"error_message": message})
