"""Which server, and which of its models: what `--trt-triton-url` says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from pytest_trtcheck.errors import ArgumentError

if TYPE_CHECKING:
    from pytest_trtcheck.spec import Precision

TIMEOUT_S = 60.0
_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
_EXAMPLE = "such as http://localhost:8000, or with the model: grpc://localhost:8001/detector_{precision}/2"
_FIELDS = ("model", "precision")
_NO_USER = "it holds no user, no password and no #"


@dataclass(frozen=True)
class Address:
    """A server, and what its models are called.

    Parameters
    ----------
    scheme
        `http`, `https`, `grpc` or `grpcs`.
    server
        Host and port.
    model
        The served model's name; in it `{model}` stands for the stem of the model's file, and `{precision}` for the
        precision that is asked for. None: the stem, or what `--trt-export` calls the engine, `{model}_{precision}`.
    version
        Of the model; None: the highest that is served.
    timeout_s
        The most that one request may take.
    """

    scheme: str
    server: str
    model: str | None = None
    version: str | None = None
    timeout_s: float = TIMEOUT_S

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address in `scheme://host[:port][/model[/version]][?timeout=SECONDS]`.

        Raises
        ------
        ArgumentError
            It is none.
        """
        try:
            parts = urlsplit(text.strip())
            port = parts.port
        except ValueError as error:
            raise _wrong(text, _NO_USER if "@" in text else str(error)) from None
        if parts.scheme not in _PORTS or not parts.hostname:
            raise _wrong(text, f"it starts with {', '.join(f'{each}://' for each in _PORTS)}, and names a host")
        if parts.username is not None or parts.fragment:
            raise _wrong(text, _NO_USER)
        names = [name for name in parts.path.split("/") if name]
        if names[:2] == ["v2", "models"]:  # As the server's own protocol spells it.
            names = [name for name in names[2:] if name != "versions"]
        if len(names) > 2 or (len(names) == 2 and not names[1].isdecimal()):
            raise _wrong(text, "its path is a model, or a model and the number of a version")
        model = names[0] if names else None
        for field in re.findall(r"{(.*?)}", model or ""):
            if field not in _FIELDS:
                raise _wrong(text, f"{{{field}}} stands for nothing; {' and '.join(map('{{{}}}'.format, _FIELDS))} do")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(
            parts.scheme,
            f"{host}:{port or _PORTS[parts.scheme]}",
            model,
            names[1] if len(names) == 2 else None,
            _timeout(text, parts.query),
        )

    @property
    def protocol(self) -> str:
        """The client library's module: `http` or `grpc`."""
        return self.scheme[:4]

    @property
    def is_encrypted(self) -> bool:
        """Whether the connection is by TLS."""
        return self.scheme.endswith("s")

    def names_of(self, label: str, precision: Precision) -> tuple[str, ...]:
        """What the server may call the model that messages call `label`; the first that it has counts."""
        stem = PurePosixPath(label.replace("\\", "/")).name
        stem = re.sub(r"\.(onnx|pt2|keras)$", "", stem)
        names = ("{model}", "{model}_{precision}") if self.model is None else (self.model,)
        return tuple(
            name.replace("{model}", stem).replace("{precision}", precision.replace("+", "_")) for name in names
        )

    def __str__(self) -> str:
        return f"{self.scheme}://{self.server}"


def _timeout(text: str, query: str) -> float:
    given = dict(parse_qsl(query, keep_blank_values=True))
    seconds = given.pop("timeout", TIMEOUT_S)
    if given:
        raise _wrong(text, f"behind the ? stands timeout=SECONDS, not {', '.join(given)}")
    try:
        number = float(seconds)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise _wrong(text, f"timeout={seconds} is no number of seconds above 0")
    return number


def _wrong(text: str, why: str) -> ArgumentError:
    shown = re.sub(r"\?.*", "?***", re.sub(r"^(\w+://)?.*@", r"\1***@", text))  # without what may be secret
    return ArgumentError(
        f"--trt-triton-url: {shown!r} is no address of a Triton server: {why}", _EXAMPLE, code="option-value"
    )
