"""Build options: those that change the engine, several of them side by side, and several builds of one engine.

The engines are built for real, by TensorRT-RTX for an A100; what a GPU makes of them is in tests/gpu.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt import options, sparsity
from pytest_trtcheck.backends.tensorrt.module import Target, TensorRTModule, find_module
from pytest_trtcheck.bundle.spec_json import options_from_json
from pytest_trtcheck.errors import ArgumentError, BuildError
from pytest_trtcheck.spec import BuildOptions
from tests import drifting_backend, onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Run, Suite

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)

A100 = Target((8, 0), here=False)
RESIZE = "RUNTIME_ACTIVATION_RESIZE_10_10"


def streams(config: Any) -> None:
    config.max_aux_streams = 0


def tells(config: Any, network: Any) -> None:
    raise ValueError(f"{type(config).__name__} of {network.num_layers > 24}")


def sets_another_target(config: Any) -> None:
    import tensorrt_rtx

    config.profiling_verbosity = tensorrt_rtx.ProfilingVerbosity.NONE
    config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM86, 0)


def raises(config: Any) -> None:
    raise KeyError("no such knob")


def returns(config: Any) -> None:
    return config  # type: ignore[no-any-return]


def adds_a_profile(config: Any, network: Any) -> None:
    import tensorrt_rtx

    log = tensorrt_rtx.Logger()
    config.add_optimization_profile(tensorrt_rtx.Builder(log).create_optimization_profile())


def takes_none() -> None: ...


class Holder:
    @staticmethod
    def method(config: Any) -> None: ...


@pytest.fixture(scope="module")
def rtx() -> TensorRTModule:
    return find_module("tensorrt_rtx")


def branches() -> onnx.ModelProto:
    """Four chains beside each other: work for several streams."""
    nodes, values = [], []
    for branch in range(4):
        last = "x"
        for index in range(3):
            name = f"{branch}{index}"
            values.append(numpy_helper.from_array(onnx_models.weights((256, 256), branch * 3 + index), f"w{name}"))
            nodes.append(helper.make_node("MatMul", [last, f"w{name}"], [f"m{name}"], f"matmul{name}"))
            nodes.append(helper.make_node("Relu", [f"m{name}"], [f"r{name}"], f"relu{name}"))
            last = f"r{name}"
    nodes.append(helper.make_node("Concat", [f"r{branch}2" for branch in range(4)], ["y"], axis=1))
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "branches",
        [helper.make_tensor_value_info("x", float32, [8, 256])],
        [helper.make_tensor_value_info("y", float32, [8, 1024])],
        values,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def build(rtx: TensorRTModule, tmp_path: Path) -> Callable[..., bytes]:
    path = onnx_models.save(branches(), tmp_path / "branches.onnx")

    def run(**given: Any) -> bytes:
        asked = BuildOptions(**given)
        plan = tensorrt.build(rtx, path, tmp_path / "engine.plan", target=A100, precision="fp32", options=asked)
        return plan.path.read_bytes()

    return run


# --- what the options do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"max_aux_streams": 0}, {"weight_streaming_mib": 1}, {"preview": (f"-{RESIZE}",)}, {"configure": streams}],
    ids=lambda given: next(iter(given)),
)
def test_an_option_changes_the_engine(build: Callable[..., bytes], given: dict[str, Any]) -> None:
    usual = build()
    assert build() == usual
    assert build(**given) != usual


def test_the_function_does_what_the_option_does(build: Callable[..., bytes]) -> None:
    assert build(configure=streams) == build(max_aux_streams=0)


def test_what_the_check_rests_on_is_set_behind_the_function(build: Callable[..., bytes]) -> None:
    assert build(configure=sets_another_target) == build()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            raises,
            r"could not call configure=raises \(.*test_build_options\.py\) for .*\n.*KeyError.*no such knob.*:\d+",
        ),
        (returns, "it returned .*return None"),
        (adds_a_profile, r"it added an optimization profile: declare shapes="),
    ],
)
def test_a_function_that_goes_wrong_is_quoted(build: Callable[..., bytes], function: Any, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        build(configure=function)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda config: None, "is a lambda: another process cannot import it"),  # noqa: ARG005
        (Holder.method, "is made inside a function or class"),
        (takes_none, "must take one argument"),
        (3, "configure=3: expected a function"),
        (print, "is no function"),
    ],
)
def test_a_function_that_no_other_process_finds(function: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        options.check_values(BuildOptions(configure=function))


def test_a_closure_is_refused() -> None:
    def inner(config: Any) -> None: ...

    with pytest.raises(ArgumentError, match="inside a function") as info:
        options.check_values(BuildOptions(configure=inner))
    assert "at the top of a module" in info.value.hint


def test_a_bundle_holds_no_code() -> None:
    given = json.loads(json.dumps(options.plain(BuildOptions(configure=streams, preview=("A",)))))
    with pytest.raises(ArgumentError, match="configure=streams, which is code"):
        options_from_json(given)
    assert options_from_json({**given, "configure": None}) == BuildOptions(preview=("A",))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_aux_streams": -1}, "max_aux_streams=-1: expected a whole number"),
        ({"max_aux_streams": "2"}, "max_aux_streams='2'"),
        ({"tiling": "most"}, "tiling='most': expected one of"),
        ({"l2_limit_mib": 0}, "l2_limit_mib=0"),
        ({"weight_streaming_mib": "all"}, "weight_streaming_mib='all'.*or 'auto'"),
        ({"dla_core": True}, "dla_core=True"),
        ({"min_subgraph_size": 0}, "min_subgraph_size=0: expected a whole number of nodes, at least 1"),
        ({"refit": 1}, "refit=1: expected True or False"),
        ({"tf32": "no"}, "tf32='no': expected True, False or None"),
        ({"preview": RESIZE}, "expected a tuple of names"),
    ],
)
def test_values_that_no_tensorrt_takes(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        options.check_values(BuildOptions(**given))


@pytest.mark.parametrize(
    ("given", "said", "hint"),
    [
        ({"tiling": "full"}, "has no build option tiling", "backend='tensorrt'"),
        ({"min_subgraph_size": 2}, "no build option min_subgraph_size: it does not divide", "'onnxruntime-tensorrt'"),
        ({"l2_limit_mib": 4}, "has no build option l2_limit_mib", "backend='tensorrt'"),
        ({"dla_core": 0}, "has no build option dla_core", "backend='tensorrt'"),
        ({"preview": ("RUNTIME_ACTIVATION_RESIZE",)}, "no preview feature", RESIZE),
        ({"preview": ("-NOTHING",)}, "no preview feature NOTHING", "it has "),
        ({"refit": True}, "with refit=True here: that takes the GPU itself", "on the machine with the GPU"),
        ({"strip_weights": True}, "with strip_weights=True here", "on the machine with the GPU"),
    ],
)
def test_what_rtx_lacks(rtx: TensorRTModule, given: dict[str, Any], said: str, hint: str) -> None:
    with pytest.raises(ArgumentError, match=said) as info:
        options.check_options(rtx, BuildOptions(**given), "fp16", A100)
    assert hint in info.value.hint


@pytest.mark.parametrize(
    ("version", "precision", "said"),
    [
        ("10.3.0", "fp16", None),
        ("10.7.0.23", "int8", "needs a calibrator for INT8 on a DLA.* from 11.4.1 on"),
        ("10.8.0.43", "fp16", "has no DLA: up to 10.7 and from 11.4.1 on"),
        ("11.4.0.106", "int8", "has no DLA"),
        ("11.4.1.5", "int8", None),
        ("11.4.1.5", "int8+fp16", None),
        ("11.4.1.5", "bf16", "computes in FP16 and INT8, not in bf16"),
        ("10.3.0", "fp32", "not in fp32"),
    ],
)
def test_a_dla_by_release_and_precision(rtx: TensorRTModule, version: str, precision: Any, said: str | None) -> None:
    module = TensorRTModule("tensorrt", version, rtx.handle)
    if said is None:
        options.check_options(module, BuildOptions(dla_core=0), precision)
    else:
        with pytest.raises(ArgumentError, match=said):
            options.check_options(module, BuildOptions(dla_core=0), precision)


def test_a_machine_without_a_dla_is_told_so(rtx: TensorRTModule) -> None:
    from pytest_trtcheck.backends.tensorrt import builder as building

    trt = rtx.handle
    builder = trt.Builder(building.logger(trt, lambda *_: None))
    with pytest.raises(building.RequestError) as info:
        building._use_dla(trt, builder, builder.create_network(0), builder.create_builder_config(), 0)
    assert info.value.errors == ["this machine has no DLA"]


def test_an_older_release_is_told_which_has_the_option(rtx: TensorRTModule) -> None:
    class Config:
        """What the builder config of 10.3 has."""

        max_aux_streams = 0

    older = type("Bindings", (), {"IBuilderConfig": Config, "BuilderFlag": rtx.handle.BuilderFlag})
    module = TensorRTModule("tensorrt", "10.3.0", older)
    options.check_options(module, BuildOptions(max_aux_streams=2, refit=True, strip_weights=True))
    with pytest.raises(ArgumentError, match=r"TensorRT 10\.3\.0 has no build option tiling") as info:
        options.check_options(module, BuildOptions(tiling="fast"))
    assert "from 10.8 on" in info.value.hint


# --- the key and the record ------------------------------------------------------------------------------------------


def test_every_option_is_in_the_key() -> None:
    apart = {"plugins", "custom_ops", "timeout_s"}  # By their content elsewhere, and no part of an engine.
    assert set(options.key_parts(BuildOptions())) == {each.name for each in fields(BuildOptions)} - apart


CONFTEST = """
import pytest
from pytest_trtcheck import BuildOptions

def tuned(config):
    config.max_aux_streams = {streams}

@pytest.fixture
def trt_build_options():
    return BuildOptions(configure=tuned, preview=("-RUNTIME_ACTIVATION_RESIZE_10_10",))
"""


def test_a_changed_function_is_another_engine(suite: Suite) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", batch=1)\ndef test_it(): ...\n')
    keys = []
    for streams_allowed in (0, 0, 1):
        (suite.path / "conftest.py").write_text(CONFTEST.format(streams=streams_allowed))
        run = suite.run_apart("--trt-gpu=A100", f"--trt-cache-dir={suite.path / 'cache'}")
        run.result.assert_outcomes(passed=1)
        keys.append((run.checks[0]["engine"]["key"], run.checks[0]["engine"]["cached"]))
    assert keys[0][0] == keys[1][0] != keys[2][0]
    assert [cached for _, cached in keys] == [False, True, False]
    assert run.checks[0]["build_options"] == {"preview": ["-RUNTIME_ACTIVATION_RESIZE_10_10"], "configure": "tuned"}
    assert "configure: " in run.checks[0]["engine"]["miss_reason"]


def test_what_a_function_reads_of_another_module_is_another_engine_too(suite: Suite) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", batch=1)\ndef test_it(): ...\n')
    reads = CONFTEST.format(streams="limits.STREAMS").replace("import pytest\n", "import limits\nimport pytest\n")
    (suite.path / "conftest.py").write_text(reads)
    keys = []
    for streams_allowed in (0, 0, 1):
        (suite.path / "limits.py").write_text(f"STREAMS = {streams_allowed}\n")
        run = suite.run_apart("--trt-gpu=A100", f"--trt-cache-dir={suite.path / 'cache'}")
        run.result.assert_outcomes(passed=1)
        keys.append(run.checks[0]["engine"]["key"])
    assert keys[0] == keys[1] != keys[2]


def test_a_check_of_the_defaults_says_nothing_of_options(suite: Suite) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", batch=1)\ndef test_it(): ...\n')
    assert "build_options" not in suite.run().checks[0]


# --- several options side by side ------------------------------------------------------------------------------------

SEVERAL = """
import pytest
from pytest_trtcheck import BuildOptions

@pytest.fixture(params=[BuildOptions(workspace_mib=4096), BuildOptions(max_aux_streams=0)],
                ids=["development", "production"])
def trt_build_options(request):
    return request.param
"""
USES = """
@trt_parity("conv.onnx", batch=1)
def test_marked(): ...

def test_by_hand(trt_check):
    trt_check("conv.onnx", batch=1)

def test_built(trt_build, trt_reference, trt_build_options):
    assert trt_build("conv.onnx", options=trt_build_options).evidence == "emulated"
"""


def test_a_parametrized_fixture_builds_side_by_side(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    (suite.path / "conftest.py").write_text(SEVERAL)
    suite.write(test_it=USES)
    page = suite.path / "report.html"
    run = run_everywhere("test_it.py", "conv.onnx", "--trt-gpu=A100", f"--trt-html={page}")
    run.result.assert_outcomes(passed=8)
    for test in ("test_marked", "test_by_hand", "conv.onnx::parity"):
        found = {name: run.check(f"{test}[{name}]") for name in ("development", "production")}
        assert found["development"]["build_options"] == {"workspace_mib": 4096}
        assert found["production"]["build_options"] == {"max_aux_streams": 0}
        assert found["development"]["engine"]["key"] != found["production"]["engine"]["key"]
    lines = run.text.splitlines()
    for title in ("conv.onnx fp16, test_it.py::test_marked", "conv.onnx fp16, conv.onnx::parity"):
        start = lines.index(title)
        assert lines[start + 1].split() == [
            *("build", "options", "worst", "error", "p50", "memory", "engine", "built", "in", "verdict"),
        ]
        assert lines[start + 2].startswith("workspace_mib=4096 ")
        assert lines[start + 3].startswith("max_aux_streams=0 ")
        # What was emulated is no error of either build.
        assert lines[start + 2].split()[1] == "–"
    assert "Builds side by side" in page.read_text()
    assert "<td>max_aux_streams=0</td>" in page.read_text()


def test_one_set_of_options_is_no_comparison(suite: Suite) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=[1, 2])\ndef test_it(): ...\n')
    assert "build options" not in suite.run().text


# --- several builds --------------------------------------------------------------------------------------------------


def test_builds_are_compared_by_their_bytes_where_none_runs(suite: Suite) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=1)\ndef test_it(): ...\n')
    run = suite.run("--trt-gpu=A100", "--trt-rebuild=3", f"--trt-cache-dir={suite.path / 'cache'}")
    run.result.assert_outcomes(passed=2)
    for record in run.checks:
        found = record["rebuild"]
        assert found["engines"] == 1
        assert len(found["builds"]) == 3
        assert {each["sha256"] for each in found["builds"]} == {record["engine"]["sha256"]}
        assert {each["verdict"] for each in found["builds"]} == {"not_measured"}
        assert found["error"] is None
        assert "3 builds, the same bytes each time: none of them ran" in record["notes"]
    # The further builds are nobody's engines.
    assert len(list((suite.path / "cache").rglob("engine.plan"))) == 2
    run = suite.run("--trt-gpu=A100", "--trt-rebuild=2", "--trt-build-only")
    assert [len(record["rebuild"]["builds"]) for record in run.checks] == [2, 2]


def test_building_again_needs_something_to_build(suite: Suite) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", batch=1)\ndef test_it(): ...\n')
    run = suite.run("--trt-rebuild=2")
    assert run.result.ret == 4
    assert "--trt-rebuild: no engine was built: there is no GPU" in run.text
    run = suite.run("--trt-rebuild=0", "--trt-gpu=A100")
    assert run.result.ret == 4
    assert "expected a whole number from 1 on, got '0'" in run.text


@pytest.fixture
def drifting(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    drifting_backend.install(suite.path, monkeypatch)
    suite.write(test_it='@trt_parity("conv.onnx", precision="fp16", batch=1)\ndef test_it(): ...\n')

    def run(*factors: float, diagnose: int = 60, more: tuple[str, ...] = ()) -> Run:
        drifting_backend.prepare(suite.path, monkeypatch, factors)
        asked = (f"--trt-rebuild={len(factors)}", "--trt-bundle=bundles", f"--trt-diagnose={diagnose}")
        return suite.run("--trt-backend=drifting", *asked, *more)

    return run


def test_the_spread_of_builds_that_differ(drifting: Callable[..., Run]) -> None:
    run = drifting(1, 1.001, 1.004, 1)
    run.result.assert_outcomes(passed=1)
    (record,) = run.checks
    found = record["rebuild"]
    assert found["engines"] == 3
    errors = [build["error"] for build in found["builds"]]
    assert errors[0] == errors[3] == record["parity"]["worst"]
    assert found["error"] == [min(errors), max(errors)]
    assert errors[2] == pytest.approx(0.004, rel=0.2)
    assert "4 builds, 3 different engines: max " in run.text


def test_that_one_build_alone_was_searched_is_said(drifting: Callable[..., Run]) -> None:
    said = "the worst input was searched on the first build alone"
    assert said in drifting(1, 1.001, more=("--trt-search=5",)).checks[0]["notes"]
    assert said not in drifting(1, 1.001).checks[0]["notes"]


@pytest.mark.parametrize("factors", [(1, 1, 1.1), (1, 1.1, 1.1)])
def test_the_worst_build_decides(drifting: Callable[..., Run], factors: tuple[float, ...]) -> None:
    run = drifting(*factors)
    run.result.assert_outcomes(failed=1)
    (record,) = run.checks
    bad = factors.index(1.1) + 1
    name = f"build {bad} of {len(factors)}"
    assert record["verdict"] == "fail"
    assert record["parity"]["worst"] == pytest.approx(0.1, rel=0.05)
    assert f"({name}) differs from" in record["message"]
    assert record["engine"]["sha256"] == record["rebuild"]["builds"][bad - 1]["sha256"]
    assert f"; {name} decides" in record["notes"][-1]
    # It is blamed, and its bundle is written, as of any that fails.
    assert record["parity"]["blame"]["step"] == "engine"
    assert "replay it on any machine" in record["message"]
    assert [build["verdict"] for build in record["rebuild"]["builds"]] == [
        "fail" if factor > 1.05 else "pass" for factor in factors
    ]


def test_a_first_build_that_fails_stays_the_one_to_read(drifting: Callable[..., Run]) -> None:
    (record,) = drifting(1.1, 1, 1.2, diagnose=0).checks
    assert record["verdict"] == "fail"
    assert record["parity"]["worst"] == pytest.approx(0.1, rel=0.05)
    assert record["rebuild"]["error"][1] == pytest.approx(0.2, rel=0.05)
    assert "decides" not in record["notes"][-1]


def test_a_build_that_cannot_be_made_is_an_error_that_names_it(drifting: Callable[..., Run]) -> None:
    run = drifting(1, 0)
    run.result.assert_outcomes(failed=1)
    assert run.checks[0]["verdict"] == "error"
    assert run.checks[0]["message"].startswith("build 2 of 2: no kernel was found")


def test_nan_is_the_worst_of_a_spread() -> None:
    from pytest_trtcheck.check.rebuild import _span

    assert _span([0.5, None, 0.25]) == (0.25, 0.5)
    assert _span([None]) is None
    least, largest = _span([float("nan"), 0.1, float("inf")]) or (0, 0)
    assert least == 0.1
    assert np.isnan(largest)


# --- sparse weights --------------------------------------------------------------------------------------------------


def pruned(array: Any, axis: int) -> Any:
    """Two of every four neighbours along an axis set to zero."""
    moved = np.moveaxis(array.copy(), axis, -1)
    moved[..., 0::4] = moved[..., 2::4] = 0
    return np.ascontiguousarray(np.moveaxis(moved, -1, axis))


@pytest.mark.parametrize("sparse", [(), ("conv1",), ("conv1", "fc"), ("conv1", "conv2", "fc")])
def test_sparse_weights_are_counted(tmp_path: Path, sparse: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    values = {
        "conv1": (rng.normal(size=(4, 8, 3, 3)), 1),
        "conv2": (rng.normal(size=(6, 4, 3, 3)), 1),
        "fc": (rng.normal(size=(6, 5)), 0),
    }
    weights = [
        numpy_helper.from_array((pruned(array, axis) if name in sparse else array).astype(np.float32), f"w_{name}")
        for name, (array, axis) in values.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w_conv1"], ["a"], "conv1"),
        helper.make_node("Conv", ["a", "w_conv2"], ["b"], "conv2"),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "w_fc"], ["y"], "fc"),
    ]
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "sparse",
        [helper.make_tensor_value_info("x", float32, [1, 8, 8, 8])],
        [helper.make_tensor_value_info("y", float32, [1, 5])],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = onnx_models.save(proto, tmp_path / "sparse.onnx")
    assert sparsity.counted(path) == (3, len(sparse))
    note = sparsity.note(path)
    assert (note is None) == (len(sparse) == 3)
    assert note is None or f"{len(sparse)} of 3 layers have weights of which at most two in four" in note


def test_the_axis_of_two_in_four_is_the_one_that_is_added_up() -> None:
    array = np.ones((4, 8))
    assert not sparsity.is_sparse(array)
    assert sparsity.is_sparse(pruned(array, 1))
    assert not sparsity.is_sparse(pruned(array, 0))
    # A rest of fewer than four may hold two.
    assert sparsity.is_sparse(np.array([[0, 1, 0, 1, 1, 1]]))
    assert not sparsity.is_sparse(np.array([[0, 1, 0, 1, 1, 1, 1]]))
