"""Where an export goes wrong: what its source computes inside, held against the tensors that ought to be the same."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache import scratch_folder
from pytest_trtcheck.diagnose.culprit import Culprit
from pytest_trtcheck.diagnose.result import Blame
from pytest_trtcheck.model import proto as protos
from pytest_trtcheck.model.sources import exported

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.result import Errors
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel

_SOUND = 1e-4
"""How far two sound ways of computing a tensor in FP32 may lie apart, as max|a − b| / max|b|."""
_OF_FAILURE = 0.1


@dataclass(frozen=True)
class _Held:
    """A value of the source against its tensor."""

    path: str
    tensor: str
    distance: float


def diagnose_export(model: OnnxModel, file: Path, case: Case, errors: Errors) -> Blame:
    """Which part of the source the export gets wrong, by its path there.

    A part is at fault where its value is wrong and the way from there to the output that failed leads through no value
    that is right; of those, the one that is computed first.

    Parameters
    ----------
    file
        The export in FP32.
    errors
        What failed; `export` is its value.
    """
    origin = model.origin
    assert origin is not None
    proto = protos.load(model.path)
    headline = f"{origin.title} and its export differ in FP32"
    blame = Blame("export", headline, errors)
    held = _held(model, file, case, proto)
    bound = min(_SOUND, _OF_FAILURE * errors.export) if errors.export else _SOUND
    right = {each.tensor for each in held if each.distance <= bound}
    reached = _reached(proto, errors.output, right)
    wrong = [each for each in held if each.tensor in reached and each.tensor not in right]
    if not wrong:
        return replace(blame, notes=(f"no module of {origin.title} was found that differs before the outputs do",))
    first, *others = wrong
    node = next(each for each in proto.graph.node if first.tensor in each.output)
    before = max((each.distance for each in held[: held.index(first)] if each.tensor in right), default=0.0)
    culprit = Culprit(
        node=node.name,
        op_type=node.op_type,
        tensor=first.tensor,
        kind="export",
        detail=f"the module computes something else: {first.distance:.3g} apart (max|a − b| / max|b|); what was "
        f"computed before lies {before:.2g} apart at most",
        own=first.distance,
        before=before,
        after=first.distance,
        module=first.path,
    )
    paths = dict.fromkeys(each.path for each in others if not first.path.startswith(f"{each.path}."))
    return replace(
        blame,
        headline=f"first at module {first.path!r}",
        culprit=culprit,
        others=(),
        notes=(f"behind it {len(paths)} more modules differ",) if paths else (),
    )


def _held(model: OnnxModel, file: Path, case: Case, proto: onnx.ModelProto) -> list[_Held]:
    """Every value of the source whose tensor is known, in the order of computation."""
    assert model.origin is not None
    inner = list(model.origin.inside(case, proto))
    values = _computed(model, file, case, {name for each in inner for name in each.tensors})
    held = []
    for each in inner:
        fitting = [name for name in each.tensors if name in values and values[name].shape == each.value.shape]
        if len(fitting) == 1 and each.value.dtype.kind in "fV":
            held.append(_Held(each.path, fitting[0], exported.distance(values[fitting[0]], each.value)))
    return held


def _computed(model: OnnxModel, file: Path, case: Case, names: Iterable[str]) -> Mapping[str, NDArray[Any]]:
    """The tensors of the export by name, those that are left of them."""
    from pytest_trtcheck.model import graph
    from pytest_trtcheck.model.ort_runner import OrtRunner

    wanted = set(names)
    ir_model = graph.read(file)
    outputs = {value.name for value in ir_model.graph.outputs}
    for node in ir_model.graph:
        ir_model.graph.outputs.extend(
            value for value in node.outputs if value.name in wanted - outputs and value.dtype is not None
        )
    with scratch_folder("export") as folder:
        graph.write(ir_model, Path(folder) / "inside.onnx")
        with closing(OrtRunner(Path(folder) / "inside.onnx", model.label, custom_ops=model.custom_ops)) as runner:
            return runner(case)


def _reached(proto: onnx.ModelProto, output: str, right: set[str]) -> set[str]:
    """The tensors that an output is computed from, on ways that pass none of `right`."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    reached, waiting = {output}, [output]
    while waiting:
        node = producers.get(waiting.pop())
        for name in node.input if node is not None else ():
            if name and name not in right and name not in reached:
                reached.add(name)
                waiting.append(name)
    return reached
