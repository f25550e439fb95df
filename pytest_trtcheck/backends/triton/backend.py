"""A Triton server as the system under test: its own model, asked over the network, is held against the user's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, ClassVar

from pytest_trtcheck.backends.base import AtOnce, Backend, Machine
from pytest_trtcheck.backends.triton.address import Address
from pytest_trtcheck.backends.triton.at_once import Load, compared
from pytest_trtcheck.backends.triton.client import INSTALL, Connection
from pytest_trtcheck.backends.triton.served import Served, ServedRuns, refuse_other_model
from pytest_trtcheck.errors import ArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_trtcheck.backends.base import Built, Runner
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.record import Evidence, GpuRan, ServerRecord
    from pytest_trtcheck.spec import InputMapping


@dataclass(frozen=True)
class Triton(Backend):
    """A Triton server.

    Parameters
    ----------
    address
        Where it is, and what it calls its models.
    models
        Lines of the ini key `trt_triton_models`: "GLOB = NAME" or "GLOB = NAME/VERSION".
    """

    address: Address
    models: tuple[str, ...] = ()

    name: ClassVar[str] = "triton"
    evidence: ClassVar[Evidence] = "server"
    is_server: ClassVar[bool] = True
    is_timed: ClassVar[bool] = True
    runs_parts: ClassVar[bool] = False
    loads: ClassVar[bool] = False

    @property
    def gpu_ran(self) -> GpuRan:
        """Nobody here knows."""
        return "unknown"

    @property
    def title(self) -> str:
        """The server's address."""
        return f"Triton at {self.address}"

    @property
    def lock_name(self) -> str:
        """The server: of those on this machine, one process at a time uses it."""
        return f"Triton-{self.address.server}"

    @classmethod
    def require(cls) -> None:
        """The client library is there; what it needs for a protocol is seen once it is used."""
        if importlib.util.find_spec("tritonclient") is None:
            raise MissingDependencyError("backend triton: tritonclient is not installed", INSTALL)

    @classmethod
    def find(cls, machine: Machine) -> Triton:
        """The server that is named; it is not asked yet.

        Raises
        ------
        ArgumentError
            None is named, or its address is none.
        """
        cls.require()
        if not machine.triton_url:
            raise ArgumentError(
                "backend triton: no server is named",
                "name it: --trt-triton-url=http://localhost:8000, TRTCHECK_TRITON_URL or the ini key trt_triton_url",
                code="argument-missing",
            )
        return cls(Address.parse(machine.triton_url), machine.triton_models)

    def versions(self) -> dict[str, str]:
        """The client's: the server's is in the record of each check."""
        return {"tritonclient": importlib.metadata.version("tritonclient")}

    def served_as(self, model: OnnxModel) -> Address:
        """The address with the name and version that a model is served by, as far as one is given.

        Raises
        ------
        ArgumentError
            A line of `trt_triton_models` is none.
        """
        for line in self.models:
            glob, equals, served = (part.strip() for part in line.rpartition("="))
            if not equals or not glob or not served:
                raise ArgumentError(
                    f"ini key trt_triton_models: {line!r} is no line of it",
                    "write GLOB = NAME or GLOB = NAME/VERSION",
                    code="option-value",
                )
            if fnmatch(model.label, glob) or fnmatch(model.label, f"*/{glob}"):
                other = Address.parse(f"{self.address}/{served}")
                return replace(self.address, model=other.model, version=other.version)
        return self.address

    def load(self, built: Built) -> Served:
        """The served model, once its inputs and outputs are the model's.

        Raises
        ------
        ServerError
            The server is down or slow, or serves no such model, or another one.
        """
        model = built.spec.model
        named = self.served_as(model)
        connection = Connection(named)
        try:
            served = connection.find(named.names_of(model.label, built.spec.precision), named.version)
            refuse_other_model(named, served, model)
        except BaseException:
            connection.close()
            raise
        return Served(connection, served, model, connection.counts(served.name, served.version))

    def notes(self, built: Built, runner: Runner) -> tuple[str, ...]:
        """What was converted on the way, and what is left out."""
        assert isinstance(runner, Served)
        model = built.spec.model
        of_server = {tensor.name: tensor.dtype for tensor in (*runner.served.inputs, *runner.served.outputs)}
        changed = [
            f"{spec.name} {spec.dtype} ↔ {of_server[spec.name]}"
            for spec in (*model.inputs, *model.outputs)
            if of_server.get(spec.name, spec.dtype) != spec.dtype
        ]
        names = {spec.name for spec in model.outputs}
        added = [tensor.name for tensor in runner.served.outputs if tensor.name not in names]
        found = [f"run by {runner.described()}"]
        # A glob that is mistyped leads to a model that only bears the file's name.
        is_unnamed = bool(self.models) and self.served_as(model) is self.address
        found += ["no line of trt_triton_models is of this model"] * is_unnamed
        found += [f"inputs and outputs were converted: {', '.join(changed)}"] * bool(changed)
        found += [f"outputs that the server gives besides were not compared: {', '.join(added)}"] * bool(added)
        return tuple(found)

    def serving(self, runner: Runner) -> ServerRecord:
        """The served model."""
        assert isinstance(runner, Served)
        return runner.described()

    # --- several requests at once ---

    def at_once(self, runner: Runner, cases: Sequence[Case]) -> AtOnce:
        """The outputs of single rows, sent at once and each alone, and the batches that the server made of them."""
        assert isinstance(runner, Served)
        return compared(runner, cases)

    def load_runs(self, runner: Runner, cases: Sequence[InputMapping]) -> Load:
        """Clients of the server, one a request that is under way."""
        assert isinstance(runner, Served)
        return Load(runner, cases)

    def disturbed(self, runner: Runner) -> tuple[str, ...]:
        """Whether others used the model since this was asked last."""
        assert isinstance(runner, Served)
        return runner.disturbed()

    def timed_runs(
        self, runner: Runner, cases: Sequence[InputMapping], *, graph: bool = True, transfers: bool = False
    ) -> ServedRuns:
        """Requests one after the other; the network is part of each, whatever `transfers` says."""
        del graph, transfers
        assert isinstance(runner, Served)
        return ServedRuns(runner, cases)
