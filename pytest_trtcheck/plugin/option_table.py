"""The option table.

Each option is declared once, in `OPTIONS`; flag, environment variable and ini key follow from its name. The plugin
registers the table, in every run; what the values mean stands in `options`.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_trtcheck.choices import BACKENDS, PRECISIONS, GraphsOf, Option

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from pytest_trtcheck.report import Report

OPTIONS: tuple[Option, ...] = (
    Option(
        "trt_gpu",
        "list",
        "the GPU to judge for: T4, A100, 'RTX 4090', Orin, sm75, turing …; several, separated by commas, to build for",
        default=(),
        metavar="GPU",
    ),
    Option(
        "trt_backend",
        "backends",
        "what runs or builds the engines; several, separated by commas, are compared",
        default="auto",
        choices=tuple(BACKENDS),
        metavar="LIST",
    ),
    Option("trt_triton_url", "text", "the Triton server that --trt-backend=triton asks", metavar="URL"),
    Option(
        "trt_precision",
        "names",
        "precisions of the tests collected from .onnx files, separated by commas",
        default=("fp16",),
        choices=PRECISIONS,
        metavar="LIST",
    ),
    Option(
        "trt_inputs",
        "lines",
        "what those tests feed: .npz or .npy files, one sample or batch each; for one of several models: MODEL=GLOB",
        default=(),
        metavar="GLOB",
    ),
    Option(
        "trt_calibration",
        "lines",
        "their calibration data: .npz or .npy files; for one of several models: MODEL=GLOB",
        default=(),
        metavar="GLOB",
    ),
    Option("trt_batch", "counts", "their batch sizes, separated by commas", default=(), metavar="LIST"),
    Option(
        "trt_shapes",
        "lines",
        "their shapes, NAME:1x3x224x224, separated by commas; for one of several models: MODEL=NAME:…",
        default=(),
        metavar="SHAPES",
    ),
    Option("trt_cache_dir", "path", "where engines, lowered models and references are kept", metavar="DIR"),
    Option("trt_cache", "text", "a cache that machines share: s3, gs or https, or a folder", metavar="URL"),
    Option(
        "trt_cache_key",
        "text",
        "a file or variable whose secret signs what the caches hold; what it did not sign is not used",
        metavar="FILE|ENV",
    ),
    Option("trt_cache_unsigned", "flag", "use caches that others can write to, without signatures", default=False),
    Option("trt_cache_show", "flag", "list what the cache holds, by model, and exit", default=False),
    Option("trt_cache_clear", "flag", "empty the cache before the tests run", default=False),
    Option(
        "trt_cache_model",
        "text",
        "the one model that --trt-cache-show and --trt-cache-clear are about: its path, its file's name, or a glob",
        metavar="MODEL",
    ),
    Option("trt_build_only", "flag", "build and cache every engine, compare nothing", default=False),
    Option("trt_rebuild", "count", "build every engine so many times, and judge each", default=1, metavar="N"),
    Option("trt_search", "count", "search the worst input of every check, by so many tries", metavar="N"),
    Option("trt_layers", "flag", "time the layers of every engine that runs", default=False),
    Option("trt_require_gpu", "flag", "fail what a GPU did not measure or run", default=False),
    Option("trt_require_evidence", "path", "fail what did not pass on a GPU in this report", metavar="REPORT"),
    Option(
        "trt_evidence_key",
        "text",
        "a file or variable whose secret signs the JSON report, and verifies that of --trt-require-evidence",
        metavar="FILE|ENV",
    ),
    Option("trt_report", "path", "write the JSON report", metavar="FILE"),
    Option("trt_html", "path", "write the HTML report", metavar="FILE"),
    Option(
        "trt_report_graph",
        "text",
        "the checks whose model the reports hold as a graph",
        default="failed",
        choices=get_args(GraphsOf),
        metavar="WHICH",
    ),
    Option(
        "trt_summary",
        "text",
        "which checks the terminal lists; auto: of many those that did not pass",
        default="auto",
        choices=("auto", "all", "failed", "none"),
        metavar="WHICH",
    ),
    Option("trt_bundle", "path", "where to write a bundle of each parity check that fails", metavar="DIR"),
    Option("trt_baseline", "path", "where baselines of errors, scores and latency are kept", metavar="DIR"),
    Option(
        "trt_update_baseline", "flag", "record this run's errors, scores and latencies as the baseline", default=False
    ),
    Option("trt_export", "path", "write the engines and typed ONNX files that the run proved", metavar="DIR"),
    Option(
        "trt_diagnose",
        "seconds",
        "the most seconds to spend on saying why a check failed; 0: none",
        default=60.0,
        metavar="SECONDS",
    ),
    Option("trt_collect", "lines", "globs of .onnx files to collect as tests", default=(), ini_only=True),
    Option(
        "trt_triton_models",
        "lines",
        "what the Triton server calls which models, one a line: 'models/detector.onnx = detector_fp16/2'",
        default=(),
        ini_only=True,
    ),
    Option("trt_gpus", "lines", "GPUs of your own, one a line: 'MyBoard = 8.7'", default=(), ini_only=True),
    Option("trt_cache_size", "size", "the most the cache may hold, such as '20 GiB'", default="20 GiB", ini_only=True),
    Option(
        "trt_memory_limit",
        "size",
        "the most memory that a model may take on ONNX Runtime, such as '12 GiB'; default: half of the machine's",
        ini_only=True,
    ),
    Option(
        "trt_time_limit",
        "seconds",
        "how long ONNX Runtime may take to load or to run a model, beside what large models and inputs get",
        default=30.0,
        ini_only=True,
    ),
    Option(
        "trt_inconclusive",
        "text",
        "what an inconclusive latency verdict does to its test",
        default="fail",
        choices=("fail", "skip"),
        ini_only=True,
    ),
    Option(
        "trt_bitwise",
        "flag",
        "fail engines whose outputs differ between runs by a single bit",
        default=False,
        ini_only=True,
    ),
    Option(
        "trt_reference",
        "text",
        "where the FP32 reference is computed",
        default="cpu",
        choices=("cpu", "cuda"),
        ini_only=True,
    ),
)


BY_NAME = {option.name: option for option in OPTIONS}
SEVERAL = frozenset({"lines", "list", "names", "counts", "backends"})
"""The kinds that are several values: all but lines may stand in one, separated by commas."""


def declare(parser: pytest.Parser, *options: Option) -> None:
    """Let pytest know options: their flags, and their ini keys."""
    group = parser.getgroup("trtcheck", "TensorRT inference checks")
    for option in options:
        shown = f"{option.help} [{', '.join(option.choices)}]" if option.choices else option.help
        if not option.ini_only:
            extra: dict[str, Any] = {"action": "store_true"} if option.kind == "flag" else {"metavar": option.metavar}
            extra |= {"action": "append"} if option.kind == "lines" else {}
            group.addoption(option.flag, dest=option.name, default=None, help=shown, **extra)
        # A list in TOML is one of these, too.
        kind: Literal["linelist", "string"] = "linelist" if option.kind in SEVERAL else "string"
        parser.addini(option.name, shown, type=kind, default=None)


def is_given(config: pytest.Config, option: str | Option) -> bool:
    """Whether the user gave an option anywhere."""
    if isinstance(option, str):
        option = BY_NAME[option]
    named = config.getoption(option.name, None) is not None
    return named or bool(os.environ.get(option.variable) or ini(config, option))


def ini(config: pytest.Config, option: Option) -> object:
    """What the ini file, or `-o`, says of an option.

    Raises
    ------
    pytest.UsageError
        It is a list of texts where one is expected.
    """
    try:
        return config.getini(option.name)
    except (TypeError, DeprecationWarning) as error:
        # From pytest 9.1 on, with `-W error`; later ones refuse it themselves. They end the session without a word.
        import pytest

        raise pytest.UsageError(f"ini key {option.name}: expected a text, got a list") from error


def added_reports(config: pytest.Config) -> Iterator[Report]:
    """The reports of the user's plugins."""
    return itertools.chain.from_iterable(config.hook.pytest_trtcheck_reports())


def any_given(config: pytest.Config) -> bool:
    """Whether any option is given at all; the defaults need no check."""
    added = (report.option for report in added_reports(config) if report.option)
    return any(is_given(config, option) for option in itertools.chain(OPTIONS, added))
