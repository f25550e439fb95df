"""What stays open from one check to the next: the many checks of a test by Hypothesis need one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


class KeptOpen:
    """Runners and references by what they are of; they are closed together."""

    def __init__(self) -> None:
        self._open: dict[Hashable, tuple[Any, object]] = {}

    def get(self, key: Hashable, make: Callable[[], Any], *, of: object = None) -> Any:
        """What was made for a key, made now if need be.

        Parameters
        ----------
        of
            What the key names by its identity. It is kept: once it was gone, another object could have its `id`.
        """
        if key not in self._open:
            self._open[key] = make(), of
        return self._open[key][0]

    def close(self) -> None:
        """Close all of them."""
        for each, _ in self._open.values():
            each.close()
        self._open.clear()
