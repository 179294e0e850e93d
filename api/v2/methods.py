"""What a method is: name, parameters, result, who may call it, and its place in REST v2.0.

A ``Method`` is declared once; ``rest``, ``rpc`` and the OpenAPI document read it. Parameters have names,
since TrueNAS' errors name them (``iscsi_target_create.name``), and types that pydantic checks.
"""

import errno
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from api.auth import Account
from api.v2.errors import ENOTAUTHENTICATED, ArgumentsError, CallError

__all__ = ["REQUIRED", "Call", "Caller", "Method", "Model", "Parameter", "Rest", "Run", "Table"]


class Model(BaseModel):
    """A JSON object among the arguments; a field that is not declared is refused."""

    model_config = ConfigDict(extra="forbid")

    def given(self) -> dict[str, Any]:
        """The fields that the caller named."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class _Required:
    """The type of ``REQUIRED``."""


REQUIRED: Final = _Required()
"""Stands where a default would: there is none."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One positional parameter of a method."""

    name: str
    kind: Any
    """A type, as pydantic takes it."""
    default: Any = REQUIRED


class Caller(Protocol):
    """The connection or request behind a call."""

    account: Account | None
    """Who is logged in; None: nobody yet."""
    address: str
    """Of the peer."""

    def subscribe(self, collection: str) -> str:
        """Have events of a collection sent from now on; the subscription's id.

        Raises:
            CallError: EINVAL, this caller has no connection to send them on.
        """

    def unsubscribe(self, id: str) -> None:
        """End a subscription; nothing if there is none."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call under way."""

    caller: Caller
    table: "Table"


Run = Callable[..., Awaitable[Any]]
"""Takes the ``Call`` and one argument for each parameter."""
Rest = tuple[str, str] | None
"""HTTP method and path below ``/api/v2.0``; ``{id}`` in it is the first parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method."""

    name: str
    summary: str
    run: Run
    parameters: tuple[Parameter, ...] = ()
    result: Any = None
    """Type of the result, for the document; None: anything."""
    writes: bool = True
    """Refused for an account that may only read."""
    public: bool = False
    """May be called before the login."""
    job: bool = False
    """Answers with the number of a job at once; ``core.get_jobs`` tells how far it is."""
    absent_status: int = 404
    """HTTP status where what is named does not exist: 422 for the one method whose clients expect that."""
    rest: Rest = None
    _adapters: dict[str, TypeAdapter[Any]] = field(default_factory=dict, repr=False)

    def adapter(self, parameter: Parameter) -> TypeAdapter[Any]:
        """The checker of a parameter, made at its first use: a thousand types cost a second to prepare."""
        found = self._adapters.get(parameter.name)
        if found is None:
            found = self._adapters[parameter.name] = TypeAdapter(parameter.kind)
        return found

    def read(self, given: Sequence[Any]) -> list[Any]:
        """Typed arguments.

        Raises:
            ArgumentsError: with all that is wrong.
        """
        if len(given) > len(self.parameters):
            raise CallError(
                f"{self.name} takes {len(self.parameters)} arguments at the most, not {len(given)}",
                errno.EINVAL,
            )
        errors: list[tuple[str, str, int]] = []
        arguments: list[Any] = []
        for position, parameter in enumerate(self.parameters):
            if position < len(given):
                try:
                    arguments.append(self.adapter(parameter).validate_python(given[position]))
                except ValidationError as error:
                    errors.extend(_problems(parameter.name, error))
            elif parameter.default is REQUIRED:
                errors.append((parameter.name, "Field required", errno.EINVAL))
            else:
                default = parameter.default
                arguments.append(default() if callable(default) else default)
        if errors:
            raise ArgumentsError(errors)
        return arguments


def reading(name: str, summary: str, run: Run, *parameters: Parameter, rest: Rest = None) -> Method:
    """A method that every account may call."""
    return Method(name=name, summary=summary, run=run, parameters=parameters, writes=False, rest=rest)


def writing(name: str, summary: str, run: Run, *parameters: Parameter, rest: Rest = None) -> Method:
    """A method for accounts that may write."""
    return Method(name=name, summary=summary, run=run, parameters=parameters, rest=rest)


def before_login(name: str, summary: str, run: Run, *parameters: Parameter, rest: Rest = None) -> Method:
    """A method that may be called before the login."""
    return replace(reading(name, summary, run, *parameters, rest=rest), public=True)


def _problems(name: str, error: ValidationError) -> Iterable[tuple[str, str, int]]:
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        path = ".".join([name, *(str(part) for part in problem["loc"])])
        yield path, problem["msg"], errno.EINVAL


LONG: Final = 100
"""A list of more objects than this is made on a thread: the event loop has others to serve."""


class Table:
    """All methods by name."""

    def __init__(self, methods: Iterable[Method] = ()) -> None:
        self._methods: dict[str, Method] = {}
        self.add(methods)

    def add(self, methods: Iterable[Method]) -> None:
        """Declare more."""
        for method in methods:
            if method.name in self._methods:
                raise ValueError(f"{method.name} is declared twice")
            self._methods[method.name] = method

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods.values())

    def find(self, name: str) -> Method | None:
        """The method of a name."""
        return self._methods.get(name)

    async def call(self, caller: Caller, method: Method, given: Sequence[Any]) -> Any:
        """Carry out a call, as far as its caller may.

        Raises:
            CallError: not logged in, not allowed, wrong arguments, or what the method says.
        """
        if not method.public:
            if caller.account is None:
                raise CallError("Not authenticated", ENOTAUTHENTICATED)
            if method.writes and caller.account.read_only:
                raise CallError(f"{method.name}: this account may only read", errno.EACCES)
        return await method.run(Call(caller, self), *method.read(given))
