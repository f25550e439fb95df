"""Checks of models that a real Triton serves: right ones pass, planted faults are caught, trouble is said in words."""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pytest_trtcheck.backends.triton.address import Address
from pytest_trtcheck.backends.triton.client import Connection
from pytest_trtcheck.latency import load
from tests import onnx_models
from tests.triton.conftest import counts, models, two_heads, words
from tests.triton.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Run, Suite

CHECK = """
@trt_parity("heads.onnx", precision="{precision}", batch={batch})
def test_it(): ...
"""


@pytest.fixture
def checked(suite: Suite, server: Server) -> Callable[..., Run]:
    """Check `heads.onnx` against a model of the server's; arguments are the URL's path and pytest's."""
    onnx_models.save(two_heads(), suite.path / "heads.onnx")

    def run(path: str, *arguments: str, precision: str = "fp32", batch: int = 3, code: str = "") -> Run:
        suite.write(test_served=code or CHECK.format(precision=precision, batch=batch))
        return suite.run("--trt-backend=triton", f"--trt-triton-url={server.http}/{path}", *arguments)

    return run


# --- what is right passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_served_model_is_held_against_the_users(suite: Suite, server: Server, protocol: str) -> None:
    suite.write(
        test_served=f"""
@trt_parity({str(onnx_models.magika())!r}, precision="fp32", batch=4)
def test_it():
    return {{"bytes": np.random.default_rng(0).integers(0, 256, (4, 2048), dtype=np.int32)}}
"""
    )
    url = f"{getattr(server, protocol)}/magika"
    run = suite.run("--trt-backend=triton", f"--trt-triton-url={url}")
    record = run.check("test_it")
    assert record["verdict"] == "pass", run.text
    assert (record["backend"], record["evidence"], record["gpu_ran"]) == ("triton", "server", "unknown")
    assert record["precision"] == "fp32"
    found = record["server"]
    assert found["url"] == getattr(server, protocol)
    assert (found["server"], found["platform"]) == ("triton 2.51.0", "python")
    assert (found["model"], found["version"], found["max_batch_size"], found["proved"]) == ("magika", "1", 8, False)
    notes = "\n".join(record["notes"])
    assert "fp32 is stated, not proved" in notes
    assert "model 'magika', version 1" in notes
    # Requests that were sent at once were put together, which the server itself counted.
    assert found["difference"] <= 1e-4
    assert sum(int(size) * count for size, count in found["batches"].items()) == found["at_once"]
    assert max(map(int, found["batches"])) > 1


def test_by_default_it_is_named_as_the_file_and_the_highest_version_is_taken(suite: Suite, server: Server) -> None:
    onnx_models.save(two_heads(), suite.path / "heads.onnx")
    suite.write(test_served=CHECK.format(precision="fp32", batch="[1, 3]"))
    run = suite.run("--trt-backend=triton", f"--trt-triton-url={server.http}")
    assert [record["verdict"] for record in run.checks] == ["pass", "pass"], run.text
    assert {record["server"]["version"] for record in run.checks} == {"3"}, "the highest version that is served"


def test_a_version_and_a_mapping_name_what_is_served(suite: Suite, server: Server) -> None:
    onnx_models.save(two_heads(), suite.path / "detector.onnx")
    suite.write(test_served=CHECK.format(precision="fp16", batch=3).replace("heads", "detector"))
    (suite.path / "pytest.ini").write_text(
        f"[pytest]\ntrt_triton_url = {server.http}\n"
        "trt_triton_models =\n    other.onnx = swapped\n    det*.onnx = heads/1\n"
    )
    run = suite.run("--trt-backend=triton")
    assert run.check("test_it")["verdict"] == "pass", run.text
    assert (run.check("test_it")["server"]["model"], run.check("test_it")["server"]["version"]) == ("heads", "1")
    unnamed = "no line of trt_triton_models is of this model"
    assert unnamed not in run.check("test_it")["notes"]
    onnx_models.save(two_heads(), suite.path / "heads.onnx")
    suite.write(test_served=CHECK.format(precision="fp16", batch=3))
    record = suite.run("--trt-backend=triton").check("test_it")
    assert record["verdict"] == "pass"
    assert unnamed in record["notes"]


def test_types_are_converted_and_it_is_said(checked: Callable[..., Run]) -> None:
    record = checked("in_halves", precision="fp16").check("test_it")
    assert record["verdict"] == "pass"
    assert any("x float32 ↔ float16, first float32 ↔ float16" in note for note in record["notes"])
    assert 0 < record["parity"]["worst"] < 1e-2


def test_a_float_that_overflows_on_the_way_is_what_the_server_is_fed(checked: Callable[..., Run]) -> None:
    code = """
@trt_parity("heads.onnx", precision="fp16")
def test_it():
    return {"x": np.array([[1e6, 1, 2, 3]], np.float32)}
"""
    record = checked("in_halves", "-Werror", code=code).check("test_it")
    assert record["verdict"] == "fail", record["message"]


def test_a_file_without_code_is_checked(checked: Callable[..., Run]) -> None:
    run = checked("heads", "heads.onnx", "--trt-precision=fp16", code="# no tests\n")
    assert run.check("heads.onnx::fp16")["verdict"] == "pass", run.text


def test_a_server_that_does_not_batch_is_said_to(checked: Callable[..., Run]) -> None:
    record = checked("one_by_one").check("test_it")
    assert record["verdict"] == "pass"
    assert set(record["server"]["batches"]) == {"1"}
    assert any("has no dynamic_batching" in note for note in record["notes"])


def test_requests_that_a_full_queue_refuses_are_counted(checked: Callable[..., Run]) -> None:
    record = checked("full").check("test_it")
    assert record["verdict"] == "pass", record["message"]
    assert any("since the server's queue was full" in note for note in record["notes"])
    assert 0 < record["server"]["at_once"] < 5 * 16


def test_a_server_that_restricts_its_lists_and_statistics_is_checked_all_the_same(
    checked: Callable[..., Run], suite: Suite, tmp_path: Path
) -> None:
    checked("heads", "--collect-only")
    models()["heads"].write(tmp_path / "repository" / "heads_fp32")
    restricted = "--http-restricted-api=model-repository,statistics:token=secret"
    with Server(tmp_path / "repository", tmp_path, restricted) as server:
        record = suite.run("--trt-backend=triton", f"--trt-triton-url={server.http}").check("test_it")
        unknown = suite.run("--trt-backend=triton", f"--trt-triton-url={server.http}/nobody").check("test_it")
    assert record["verdict"] == "pass", record["message"]
    assert (record["server"]["model"], record["server"]["version"]) == ("heads_fp32", "3")
    assert record["server"]["batches"] is None
    assert "gives no statistics, so whether it batched them is not known" in "\n".join(record["notes"])
    assert "model 'nobody' is not ready, or not there; it does not list its models" in unknown["message"]


# --- planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("scaled", r"emulated, fp16 keeps the limits, and the server does not"),
        ("swapped", r"outputs 'first' and 'second' are swapped"),
        ("mixed", r"requests that are sent at once do not give what each gives alone"),
        ("mixed_inside", r"in which batches the models of an ensemble ran, the server does not tell"),
    ],
)
def test_a_fault_on_the_server_fails(checked: Callable[..., Run], model: str, said: str) -> None:
    run = checked(model, precision="fp16", batch=1)
    record = run.check("test_it")
    assert record["verdict"] == "fail", run.text
    assert re.search(said, record["message"]), record["message"]
    assert record["evidence"] == "server"


def test_what_requests_of_one_answer_cannot_show_is_said(checked: Callable[..., Run], suite: Suite) -> None:
    onnx_models.save(words(), suite.path / "words.onnx")
    code = """
@trt_parity("words.onnx", precision="fp32", batch=1)
def test_it():
    return {"ids": np.array([[1, 2, 3, 4]], np.int32)}
@trt_parity("words.onnx", precision="fp32", batch=2)
def test_two():
    return {"ids": np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)}
"""
    run = checked("words_mixed", code=code)
    record = run.check("test_it")
    assert record["verdict"] == "pass", record["message"]
    assert "the same answer, so whether each got its own was not seen" in "\n".join(record["notes"])
    assert run.check("test_two")["verdict"] == "fail"


def test_a_score_alone_says_what_it_does_not_see(checked: Callable[..., Run]) -> None:
    code = """
from pytest_trtcheck import Case
def first(outputs, case): return outputs["first"][:, 0]
CASES = [Case({"x": np.random.default_rng(seed).random((1, 4), np.float32)}, np.zeros(1)) for seed in range(5)]
@trt_parity("heads.onnx", precision="fp32", score=first, max_drop=10.0)
def test_alone(): return CASES
@trt_parity("heads.onnx", precision="fp32", score=first, max_drop=10.0, tol=1e-3)
def test_both(): return CASES
"""
    run = checked("mixed", code=code)
    record = run.check("test_alone")
    assert record["verdict"] == "pass", record["message"]
    assert any("requests at once give what each gives alone was not looked at" in note for note in record["notes"])
    assert run.check("test_both")["verdict"] == "fail"


def test_an_integer_that_the_models_type_cannot_hold_is_another_one(checked: Callable[..., Run], suite: Suite) -> None:
    onnx_models.save(counts(), suite.path / "counts.onnx")
    code = """
@trt_parity("counts.onnx", precision="fp32", tol=0)
def test_it():
    return {"x": np.array([[1, 2, 3, 4]], np.float32)}
"""
    record = checked("beyond", code=code).check("test_it")
    assert record["verdict"] == "error", record["message"]
    said = "output 'whole' is int32 in the model, and the server answered with int64 values that it cannot hold"
    assert said in record["message"], record["message"]


def test_a_model_that_takes_no_batch_of_those_that_the_server_makes_is_an_error(checked: Callable[..., Run]) -> None:
    record = checked("only_one", batch=1).check("test_it")
    assert record["verdict"] == "error"
    assert "it was built for a batch of one" in record["message"]
    assert "requests were sent at once" in record["message"]


def test_a_failure_is_replayed_on_the_server(checked: Callable[..., Run], suite: Suite, server: Server) -> None:
    record = checked("scaled", "--trt-bundle=bundles").check("test_it")
    assert record["verdict"] == "fail"
    bundle = re.search(r"pytest (bundles\S+)", record["message"])
    assert bundle is not None, record["message"]
    again = suite.run(bundle[1], f"--trt-triton-url={server.http}/scaled").check("replay")
    assert (again["verdict"], again["evidence"]) == ("fail", "server")
    assert "the outputs are the recorded ones" in "\n".join(again["notes"])
    mended = suite.run(bundle[1], f"--trt-triton-url={server.http}/heads").check("replay")
    assert mended["verdict"] == "pass"


def test_a_gpu_is_not_taken_on_trust(checked: Callable[..., Run]) -> None:
    record = checked("heads", "--trt-require-gpu").check("test_it")
    assert record["verdict"] == "fail"
    assert "on a GPU or not" in record["message"]


# --- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nobody", [r"serves no model 'nobody': it serves beyond, cached, cached_inside, full,", "trt_triton_models"]),
        ("head", ["did you mean 'heads'"]),
        ("heads/2", [r"model 'heads' has no version 2 that is ready: 1, 3 are"]),
        ("broken", ["model 'broken' is not ready: .*the weights are gone"]),
        (
            "wider",
            [
                "model 'wider', version 1, is not heads.onnx",
                r"input 'x' is x float32 \[\?, 5\] on the server, and \[N, 4\] in the model",
                "outputs that the server lacks: second",
            ],
        ),
        ("cached", ["model 'cached' has a response cache", "response_cache { enable: false }"]),
        ("cached_inside", ["model 'cached', a part of the ensemble 'cached_inside', has a response cache"]),
        ("hangs?timeout=1", ["model 'hangs': no answer within 1 s", r"\?timeout=2"]),
    ],
)
def test_what_the_server_does_not_have_is_an_error(checked: Callable[..., Run], path: str, said: list[str]) -> None:
    run = checked(path)
    record = run.check("test_it")
    assert record["verdict"] == "error", run.text
    for each in said:
        assert re.search(each, record["message"], re.DOTALL), record["message"]
    assert "Traceback" not in run.text


def test_over_grpc_a_slow_model_is_slow_too(suite: Suite, server: Server, checked: Callable[..., Run]) -> None:
    checked("heads")
    run = suite.run("--trt-backend=triton", f"--trt-triton-url={server.grpc}/hangs?timeout=1")
    assert "no answer within 1 s" in run.check("test_it")["message"]


def test_a_batch_that_the_server_does_not_take_is_an_error(checked: Callable[..., Run]) -> None:
    record = checked("heads", batch=9).check("test_it")
    assert record["verdict"] == "error"
    assert "a batch of 9, and Triton serves model 'heads' in batches of at most 8" in record["message"]


def test_a_precision_that_nobody_states_is_an_error_unless_the_tolerance_decides(checked: Callable[..., Run]) -> None:
    code = """
@trt_parity("heads.onnx", batch=3)
def test_neither(): ...
@trt_parity("heads.onnx", batch=3, tol=1e-3)
def test_tol(): ...
"""
    run = checked("heads", code=code)
    assert "neither precision= nor tol= is given" in run.check("test_neither")["message"]
    record = run.check("test_tol")
    assert (record["verdict"], record["precision"]) == ("pass", None)
    assert "the precision is not known" in "\n".join(record["notes"])


@pytest.fixture
def silent() -> Iterator[str]:
    """Something that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_never_answers_ends_at_the_time_limit(
    checked: Callable[..., Run], suite: Suite, silent: str, scheme: str
) -> None:
    checked("heads")
    run = suite.run("--trt-backend=triton", f"--trt-triton-url={scheme}://{silent}?timeout=1")
    record = run.check("test_it")
    assert record["verdict"] == "error"
    assert "no answer within 1 s" in record["message"]


def test_an_answer_that_comes_byte_by_byte_ends_at_the_time_limit(checked: Callable[..., Run], suite: Suite) -> None:
    checked("heads", "--collect-only")
    ended = threading.Event()

    def trickle(listening: socket.socket) -> None:
        asking, _ = listening.accept()
        with asking, suppress(OSError):
            asking.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not ended.wait(0.1):
                asking.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=trickle, args=(listening,))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/heads?timeout=1"
        started = time.monotonic()
        try:
            record = suite.run("--trt-backend=triton", f"--trt-triton-url={url}").check("test_it")
            took = time.monotonic() - started
        finally:
            ended.set()
            thread.join()
    assert "no answer within 1 s" in record["message"], record["message"]
    assert took < 30


def test_the_wrong_port_is_said(checked: Callable[..., Run], suite: Suite, server: Server) -> None:
    checked("heads")
    for url in (f"http://127.0.0.1:{server.ports[1]}", f"grpc://127.0.0.1:{server.ports[0]}"):
        record = suite.run("--trt-backend=triton", f"--trt-triton-url={url}").check("test_it")
        assert record["verdict"] == "error"
        assert "on port 8000 and for gRPC on 8001" in record["message"], record["message"]


# --- latency ----------------------------------------------------------------------------------------------------------

TIMED = """
@trt_parity("heads.onnx", precision="fp32", batch=1)
@trt_latency({budgets}, max_seconds={seconds})
def test_it(): ...
"""


def timed(budgets: str, seconds: float = 1.5) -> str:
    """A check of latency, with so many seconds for each part of it."""
    return TIMED.format(budgets=budgets, seconds=seconds)


def test_latency_is_measured_one_by_one_and_under_load(checked: Callable[..., Run]) -> None:
    run = checked("one_by_one", code=timed('p50_ms=10_000, min_qps={"default": 0.1}', seconds=3))
    latency = run.check("test_it")["latency"]
    assert latency["details"]["measured"] == "from request to answer"
    levels = latency["details"]["load"]
    assert [each["concurrency"] for each in levels] == [2**index for index in range(len(levels))]
    assert all(each["qps"] > 0 and each["p50_ms"] <= each["p99_ms"] for each in levels)
    assert latency["details"]["load_ended"]
    budgets = {budget["name"]: budget["verdict"] for budget in latency["budgets"]}
    assert budgets["p50_ms"] == "pass"
    assert "under load, by requests at once: 1: " in "\n".join(run.check("test_it")["notes"])


def test_a_model_that_is_another_one_once_it_was_measured_is_an_error(checked: Callable[..., Run]) -> None:
    record = checked("spoilt", code=timed("p50_ms=10_000", seconds=3)).check("test_it")
    assert record["verdict"] == "error", record["message"]
    assert "answers otherwise than when it was compared: max of 'first' is 0.1" in record["message"]
    assert record["parity"]["verdict"] == record["latency"]["verdict"] == "pass"
    assert record["code"] == "model-changed"


def test_what_cannot_be_fast_enough_fails(checked: Callable[..., Run]) -> None:
    # The model sleeps 10 ms, one request after the other: no load makes it give 1,000 answers a second.
    run = checked("slow", code=timed("p50_ms=1, min_qps=1000", seconds=6))
    record = run.check("test_it")
    assert record["verdict"] == "fail", record["message"]
    budgets = {budget["name"]: budget["verdict"] for budget in record["latency"]["budgets"]}
    assert budgets["p50_ms"] == "fail"
    # On a busy machine there may be no time to see that more requests at once bring no more.
    is_known = record["latency"]["details"]["load_ended"] == load.PLATEAU
    assert budgets["min_qps"] in (["fail"] if is_known else ["inconclusive"])


def test_others_on_the_server_excuse_a_failure(checked: Callable[..., Run], server: Server) -> None:
    ended = threading.Event()

    def disturb() -> None:
        with closing(Connection(Address.parse(server.http))) as other:
            model = other.find(["slow"], None)
            prepared = other.prepared(model, {"x": np.zeros((1, 4), np.float32)})
            while not ended.is_set():
                other.infer(model, prepared)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        record = checked("slow", code=timed("p50_ms=1")).check("test_it")
    finally:
        ended.set()
        thread.join()
    assert record["verdict"] == "inconclusive", record["message"]
    assert "others used the model meanwhile" in record["message"]


def test_a_served_model_is_not_compared_with_itself_for_speed(checked: Callable[..., Run]) -> None:
    record = checked("heads", code=timed('min_speedup={"fp16": 2}')).check("test_it")
    assert record["verdict"] == "error"
    assert "would be compared with itself" in record["message"]


def test_two_workers_measure_one_after_the_other(checked: Callable[..., Run], suite: Suite, server: Server) -> None:
    two = timed("p50_ms=1") + timed("p50_ms=1").replace("test_it", "test_other")
    checked("slow", "--collect-only", code=two)
    run = suite.run_apart("-n2", "--trt-backend=triton", f"--trt-triton-url={server.http}/slow")
    # Had one disturbed the other, neither could fail.
    assert [record["verdict"] for record in run.checks] == ["fail", "fail"], run.text
