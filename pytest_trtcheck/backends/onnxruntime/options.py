"""How the marker's build options become a provider's, which are strings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_trtcheck.spec import BuildOptions, ShapeRange

    Written = Callable[[Any], Mapping[str, str]]

MIB = 1 << 20
_OURS = frozenset({"io", "custom_ops", "timeout_s", "timing_cache"})
"""What is done here, not by the provider: the types of inputs and outputs, the reference's operators, the build's
process, and whether timings are kept."""


@dataclass(frozen=True)
class Counterparts:
    """What a provider has for our build options.

    Parameters
    ----------
    written
        By our option's name, what writes its value as the provider's options; a ValueError says why it can't.
    instead
        By our option's name, what to say of one that the provider has not.
    """

    written: Mapping[str, Written]
    instead: Mapping[str, str] = field(default_factory=dict)

    def of(self, options: BuildOptions, title: str) -> dict[str, str]:
        """The provider's options.

        Raises
        ------
        ArgumentError
            One has no counterpart; it is named.
        """
        found: dict[str, str] = {}
        for name in options.given():
            if name in _OURS:
                continue
            value = getattr(options, name)
            if name not in self.written:
                raise _no_counterpart(title, name, value, self.instead.get(name, ""))
            try:
                found |= self.written[name](value)
            except ValueError as error:
                raise _no_counterpart(title, name, value, str(error)) from None
        return found


def _no_counterpart(title: str, name: str, value: object, why: str) -> ArgumentError:
    return ArgumentError(
        f"{title} has no counterpart of the build option {name}={value!r}" + (f": {why}" if why else ""),
        "leave it out, or check the engine that TensorRT builds itself: backend='tensorrt'",
        code="build-option",
    )


def as_is(name: str) -> Written:
    """The value under another name; True is 1."""
    return lambda value: {name: str(int(value))}


def mib(name: str) -> Written:
    """MiB as bytes."""
    return lambda value: {name: str(value * MIB)}


def profile_shapes(profile: Mapping[str, ShapeRange], prefix: str) -> dict[str, str]:
    """The optimization profile as the TensorRT providers take it: `in:1x3x224x224,other:1x4` for each of the ends.

    >>> from pytest_trtcheck.spec import ShapeRange
    >>> profile_shapes({"x": ShapeRange((1, 4), (2, 4), (8, 4))}, "trt_profile")["trt_profile_max_shapes"]
    'x:8x4'
    """
    spans = {name: span for name, span in profile.items() if span.min}
    if not spans:
        return {}
    return {
        f"{prefix}_{end}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, getattr(span, end)))}" for name, span in spans.items()
        )
        for end in ("min", "opt", "max")
    }
