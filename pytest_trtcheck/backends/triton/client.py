"""Talking to a Triton server: over HTTP or gRPC by NVIDIA's client, with errors in the user's words."""

from __future__ import annotations

import importlib
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 - numpy knows bfloat16 by it
import numpy as np

from pytest_trtcheck.errors import InputError, MissingDependencyError, ServerError, first_line, listed, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.triton.address import Address
    from pytest_trtcheck.spec import InputMapping, Shape

DTYPES = {
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
}
"""numpy's name of what the protocol calls a type. Strings (BYTES) are not among them: nothing here compares any."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a served model: its type by the protocol's name, -1 where a dimension is open."""

    name: str
    datatype: str
    shape: Shape
    optional: bool = False

    @property
    def dtype(self) -> str:
        """Numpy's name of its type."""
        return DTYPES.get(self.datatype, self.datatype)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join('?' if dim == -1 else str(dim) for dim in self.shape)}]"


@dataclass(frozen=True)
class ServedModel:
    """A model as the server describes it.

    Parameters
    ----------
    server
        Name and version of the server.
    platform
        What runs the model: the platform, or where there is none the backend.
    max_batch_size
        0: its tensors have no batch dimension that the server knows of.
    batches_dynamically
        Whether requests may be put together: by the model, or of an ensemble by one that it is made of.
    is_ensemble
        Whether it is made of other models, whose batches the server counts with these.
    """

    name: str
    version: str
    server: str
    platform: str
    max_batch_size: int
    batches_dynamically: bool
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    is_ensemble: bool = False


@dataclass(frozen=True)
class Counts:
    """What the server has counted of a model: requests' inferences, executions, and executions by batch size."""

    inferences: int
    executions: int
    batches: Mapping[int, int]

    @property
    def least(self) -> int:
        """The inferences that are counted both ways; a moment later it is all of them."""
        if not self.batches:  # As of an ensemble.
            return self.inferences
        return min(self.inferences, sum(size * count for size, count in self.batches.items()))

    def since(self, before: Counts) -> Counts:
        """What came in between."""
        grown = {size: count - before.batches.get(size, 0) for size, count in self.batches.items()}
        return Counts(
            self.inferences - before.inferences,
            self.executions - before.executions,
            {size: count for size, count in sorted(grown.items()) if count > 0},
        )


class Connection:
    """A client of one server, for one thread.

    Raises
    ------
    MissingDependencyError
        The client library, or what it needs for this protocol, is not installed.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._is_grpc = address.protocol == "grpc"
        self._module = library(address.protocol)
        self._timeout: Any = None if self._is_grpc else importlib.import_module("gevent").Timeout
        names = () if self._is_grpc else ("connection_timeout", "network_timeout")
        limits = dict.fromkeys(names, address.timeout_s)
        with self._said():
            self._client = self._module.InferenceServerClient(address.server, ssl=address.is_encrypted, **limits)

    def close(self) -> None:
        """End the connection; calling it twice is harmless."""
        self._client.close()

    # --- what the server says of itself ---

    def find(self, names: Sequence[str], version: str | None) -> ServedModel:
        """The first of some models that the server has, in the version that is named or the highest one.

        Raises
        ------
        ServerError
            The server does not answer, or serves no such model; those that it serves are listed.
        """
        told = self._ask("get_server_metadata", hint=_WHICH_PORT)
        index = self._index()
        name = next((name for name in names if self._has(name, index)), names[0])
        asked_for = self._asked_for(name, version, index)
        metadata = self._ask("get_model_metadata", name, asked_for)
        found = asked_for or max(metadata.get("versions", ()), key=int, default="")
        configs = self._configs(name, found)
        config = configs[name]
        for each in configs:
            if configs[each].get("response_cache", {}).get("enable"):
                part = f", a part of the ensemble {name!r}," * (each != name)
                raise self._error(
                    f"model {each!r}{part} has a response cache: what it answers need not have been computed",
                    "set response_cache { enable: false } in the config.pbtxt of the model that is checked",
                )
        optional = {each["name"] for each in config.get("input", ()) if each.get("optional")}
        inputs, outputs = (
            tuple(
                Tensor(each["name"], each["datatype"], tuple(map(int, each.get("shape", ()))), each["name"] in optional)
                for each in metadata.get(side, ())
            )
            for side in ("inputs", "outputs")
        )
        return ServedModel(
            name,
            found,
            f"{told.get('name', 'triton')} {told.get('version', '')}".strip(),
            config.get("platform") or config.get("backend") or metadata.get("platform", ""),
            int(config.get("max_batch_size", 0)),
            any("dynamic_batching" in each for each in configs.values()),
            inputs,
            outputs,
            len(configs) > 1,
        )

    def _configs(self, name: str, version: str) -> dict[str, Mapping[str, Any]]:
        """The configurations of a model and, where it is an ensemble, of all that it is made of, by name."""
        found: dict[str, Mapping[str, Any]] = {}
        left = {name: version}
        while left:
            each, its_version = left.popitem()
            config = self._ask("get_model_config", each, its_version)
            found[each] = config = config.get("config", config)
            for step in config.get("ensemble_scheduling", {}).get("step", ()):
                if step["model_name"] not in found:
                    its = int(step.get("model_version", -1))
                    left[step["model_name"]] = "" if its == -1 else str(its)
        return found

    def _has(self, name: str, index: Sequence[Mapping[str, Any]] | None) -> bool:
        if index is not None:
            return any(each["name"] == name for each in index)
        with self._said(f"model {name!r}"), self._in_time():
            return bool(self._client.is_model_ready(name, **self._limit()))

    def _asked_for(self, name: str, version: str | None, index: Sequence[Mapping[str, Any]] | None) -> str:
        """The version to take, which is ready; empty where the server lists none."""
        mine = [each for each in index or () if each["name"] == name]
        ready = sorted({each["name"] for each in index or () if each.get("state") == "READY"})
        shown = f"it serves {listed(ready, 20)}" if ready else "it serves no model that is ready"
        if index is not None and not mine:
            how = f"name it in the URL, {self.address}/NAME, or in the ini key trt_triton_models"
            raise self._error(f"serves no model {name!r}: {shown}", f"{suggestion(name, ready)} {how}".strip())
        versions = [each["version"] for each in mine if each.get("state") == "READY" and each.get("version")]
        if mine and not versions:
            reasons = {each["reason"] for each in mine if each.get("reason")}
            raise self._error(
                f"model {name!r} is not ready" + (f": {'; '.join(sorted(reasons))}" if reasons else "") + f"; {shown}",
                "see the server's log",
            )
        if version is not None and mine and version not in versions:
            raise self._error(f"model {name!r} has no version {version} that is ready: {', '.join(versions)} are", "")
        chosen = version or max(versions, key=int, default="")
        with self._said(f"model {name!r}"), self._in_time():
            is_ready = self._client.is_model_ready(name, chosen, **self._limit())
        if not is_ready:
            unlisted = "; it does not list its models" if index is None else ""
            raise self._error(f"model {name!r} is not ready, or not there{unlisted}", "see the server's log")
        return chosen

    def _index(self) -> Sequence[Mapping[str, Any]] | None:
        """The models that the server knows; None where it does not tell."""
        try:
            found = self._ask("get_model_repository_index")
        except ServerError:
            return None
        models: Sequence[Mapping[str, Any]] = found.get("models", ()) if isinstance(found, dict) else found
        return models

    def counts(self, name: str = "", version: str = "") -> Counts | None:
        """What was counted of a model, or of all of them; None where the server gives no statistics."""
        try:
            found = self._ask("get_inference_statistics", name, version)
        except ServerError:
            return None
        models = found.get("model_stats", ())
        batches: dict[int, int] = {}
        for each in models:
            for entry in each.get("batch_stats", ()):
                size = int(entry["batch_size"])
                batches[size] = batches.get(size, 0) + int(entry.get("compute_infer", {}).get("count", 0))
        return Counts(
            sum(int(each.get("inference_count", 0)) for each in models),
            sum(int(each.get("execution_count", 0)) for each in models),
            batches,
        )

    # --- inference ---

    def prepared(self, model: ServedModel, inputs: InputMapping) -> list[Any]:
        """Inputs as the client sends them, in the server's types and ranks.

        Raises
        ------
        InputError
            The server takes no batch of that size, or a value does not fit the type that it takes.
        """
        found = []
        for tensor in model.inputs:
            if tensor.name not in inputs and tensor.optional:
                continue
            array = np.asarray(inputs[tensor.name])
            if model.max_batch_size and array.shape[:1] > (model.max_batch_size,):
                raise InputError(
                    f"input {tensor.name!r} has a batch of {array.shape[0]}, and Triton serves model {model.name!r} in "
                    f"batches of at most {model.max_batch_size} (max_batch_size)",
                    "give smaller inputs, or batch= at most that",
                    code="input-batch",
                )
            if array.ndim + 1 == len(tensor.shape) and tensor.shape[-1] == 1:
                array = array[..., np.newaxis]  # Triton has no scalars: `dims: [ 1 ]` with a reshape stands for one.
            with np.errstate(over="ignore"):  # A float that becomes infinite is what the server is fed.
                sent = np.ascontiguousarray(array, np.dtype(tensor.dtype))
            if array.dtype.kind in "iu" and not np.array_equal(sent, array):
                raise InputError(
                    f"input {tensor.name!r} has values that {tensor.dtype} cannot hold, which Triton takes"
                )
            # The client takes BF16 as FP32, whose upper half it sends: of what is BF16 already, nothing is lost.
            sent = sent.astype(np.float32) if tensor.datatype == "BF16" else sent
            found.append(self._module.InferInput(tensor.name, sent.shape, tensor.datatype).set_data_from_numpy(sent))
        return found

    def infer(self, model: ServedModel, prepared: Sequence[Any]) -> Any:
        """Send one request and wait for its answer.

        Raises
        ------
        ServerError
            It failed, took longer than the time limit, or another model answered.
        """
        with self._said(f"model {model.name!r}"):
            with self._in_time():
                answer = self._client.infer(model.name, prepared, model_version=model.version, **self._limit())
            answered_by = self._answered_by(answer)
        self._refuse_other(model, answered_by)
        return answer

    def timed(self, model: ServedModel, prepared: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
        """Send requests one after the other; when each was sent and answered, in seconds, as an array of shape (n, 2).

        Raises
        ------
        ServerError
            One failed, or another model answered.
        """
        name, version, limit = model.name, model.version, self._limit()
        infer, clock, times = self._client.infer, time.perf_counter, np.empty((len(prepared), 2))
        answered_by = set()
        with self._said(f"model {model.name!r}"):
            for index, request in enumerate(prepared):
                with self._in_time():
                    began = clock()
                    answer = infer(name, request, model_version=version, **limit)
                    times[index] = began, clock()
                answered_by.add(self._answered_by(answer))
        for each in sorted(answered_by):
            self._refuse_other(model, each)
        return times

    def _answered_by(self, answer: Any) -> tuple[str, str]:
        """The model and version that an answer says that it is of; empty where it does not say."""
        response = answer.get_response()
        if self._is_grpc:
            return response.model_name, response.model_version
        return str(response.get("model_name") or ""), str(response.get("model_version") or "")

    def _refuse_other(self, model: ServedModel, answered_by: tuple[str, str]) -> None:
        asked = model.name, model.version
        if all(told in {"", wanted} or not wanted for told, wanted in zip(answered_by, asked, strict=True)):
            return
        wanted, found = (
            f"model {name!r}" + f", version {version}" * bool(version) for name, version in (asked, answered_by)
        )
        raise self._error(
            f"{wanted} was asked, and {found} answered",
            "what stands between here and the server sends requests on to another model: name the server itself",
        )

    def outputs(self, model: ServedModel, answer: Any, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The tensors of an answer, by name, as the client gives them: BF16 as FP32.

        Raises
        ------
        ServerError
            One is missing, or cannot be read.
        """
        found = {}
        for name in names:
            with self._said(f"model {model.name!r}, output {name!r}"):
                array = answer.as_numpy(name)
            if array is None:
                raise self._error(f"model {model.name!r} answered without output {name!r}", "")
            found[name] = array
        return found

    # --- errors ---

    def _ask(self, method: str, *arguments: Any, hint: str = "") -> Any:
        with self._said(hint=hint):
            how = {"as_json": True} if self._is_grpc else {}
            with self._in_time():
                return getattr(self._client, method)(*arguments, **how, **self._limit())

    def _limit(self) -> dict[str, float]:
        """What gRPC is given with each call, which ends it in time."""
        return {"client_timeout": self.address.timeout_s} if self._is_grpc else {}

    def _in_time(self) -> AbstractContextManager[object]:
        """Ends a request over HTTP that takes too long: the connection's own limits begin anew with each byte."""
        return nullcontext() if self._is_grpc else self._timeout(self.address.timeout_s, TimeoutError)

    @contextmanager
    def _said(self, about: str = "", hint: str = "") -> Iterator[None]:
        """What goes wrong in the client, in the user's words."""
        where = f"{about}: " if about else ""
        try:
            yield
        except self._module.InferenceServerException as error:
            said, status = first_line(error.message()), str(error.status() or "")
            if "DEADLINE_EXCEEDED" in status or "timed out" in said.lower() or "timeout" in said.lower():
                raise self._too_slow(where) from error
            if ("UNAVAILABLE" in status and "failed to connect" in said) or "resolv" in said:
                raise self._unreachable(said) from error
            raise self._error(f"{where}{said}", hint) from error
        except TimeoutError as error:
            raise self._too_slow(where) from error
        except OSError as error:
            raise self._unreachable(error.strerror or str(error)) from error
        except Exception as error:
            # What is no Triton server may answer too, and one that ends closes the connection.
            raise self._error(f"{where}no answer that is Triton's: {first_line(error)}", _WHICH_PORT) from error

    def _error(self, what: str, hint: str) -> ServerError:
        return ServerError(f"Triton at {self.address}: {what}", hint)

    def _too_slow(self, where: str) -> ServerError:
        limit = self.address.timeout_s
        return self._error(
            f"{where}no answer within {limit:g} s",
            f"give it longer: --trt-triton-url={self.address}/…?timeout={2 * limit:g}, or see what it does",
        )

    def _unreachable(self, said: str) -> ServerError:
        return self._error(f"cannot be reached: {said}", f"start the server, or name another one; {_WHICH_PORT}")


INSTALL = 'pip install "pytest-trtcheck[triton]"'
_WHICH_PORT = "Triton listens for HTTP on port 8000 and for gRPC on 8001 unless told otherwise"


def library(protocol: str) -> Any:
    """The client's module for a protocol.

    Raises
    ------
    MissingDependencyError
        It is not installed, or lacks something for this protocol.
    """
    try:
        return importlib.import_module(f"tritonclient.{protocol}")
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            f"a Triton server is asked by tritonclient, which cannot be imported for {protocol}: {first_line(error)}",
            INSTALL,
        ) from error
