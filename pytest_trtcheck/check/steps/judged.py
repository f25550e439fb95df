"""What it computes, how well and how fast, and what is concluded from that."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_trtcheck import backends
from pytest_trtcheck.check import blame, evidence, latency, message, parity, scoring
from pytest_trtcheck.check.rebuild import judged_again
from pytest_trtcheck.check.steps.asked import decides_alone, lowered_model
from pytest_trtcheck.check.steps.engine import loaded, loaded_by, note_broken
from pytest_trtcheck.choices import half_part
from pytest_trtcheck.errors import (
    ArgumentError,
    CheckError,
    Code,
    ModelError,
    ServerError,
    UnsupportedTargetError,
    first_line,
    plural,
)
from pytest_trtcheck.gpu.device import why_no_tf32
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.arrays import files_behind
from pytest_trtcheck.precision.arithmetic import MATRIX_OPERATORS
from pytest_trtcheck.precision.emulation import Emulated, computes_the_reference
from pytest_trtcheck.record import BASELINE, ServerRecord, combine, is_bad
from pytest_trtcheck.spec import PRECISIONS

if TYPE_CHECKING:
    from pytest_trtcheck.backends.base import Backend, Runner
    from pytest_trtcheck.backends.tensorrt.plan_file import PlanFile
    from pytest_trtcheck.check.request import Known, Settings
    from pytest_trtcheck.spec import Precision


_SCORE_ALONE = (
    "a score alone is asked for: that requests at once give what each gives alone was not looked at, nor that "
    "the server kept its model meanwhile"
)


def inspected(settings: Settings, known: Known) -> Known:
    """What the loaded engine tells of itself."""
    del settings
    if known.runner is None or known.built is None:
        return known
    engine = known.running.described(known.built, known.runner) or known.record.engine
    serving = known.running.serving(known.runner)
    known = known.recorded(*known.running.notes(known.built, known.runner), engine=engine, server=serving)
    return known if known.existing is None else _with_precision_read(known, known.existing.file)


def _with_precision_read(known: Known, file: PlanFile) -> Known:
    """An engine that exists with what its layers compute in, which what is stated must not contradict.

    Raises
    ------
    ModelError, ArgumentError
        It does; or the engine does not tell, and nothing else does.
    """
    from pytest_trtcheck.backends.tensorrt.existing import layers_shown, precisions_read

    engine, spec = known.record.engine, known.request.parity
    assert engine is not None
    layers = engine.layers_by_precision or {}
    read = precisions_read(file.label, layers)
    stated = known.precision if not known.has_unknown_precision else None
    if not read:
        if stated is None and not decides_alone(spec.tol):
            raise ArgumentError(
                f"{file.label}: the engine does not tell what it computes in (it was built without detailed "
                "profiling), and neither precision= nor tol= is given",
                "give one, or build it with ProfilingVerbosity.DETAILED (trtexec --profilingVerbosity=detailed)",
                code="engine-precision",
            )
        shown = "the precision is not known" if stated is None else f"{stated} is stated, not proved"
        note = f"{shown}: the engine inspector tells no layer's type"
        return known.recorded(note, engine=replace(engine, proved=False), precision=stated and known.shown_precision)
    if stated is not None and stated not in read:
        by = "precision=" if spec.states_precision else "the manifest beside it says "
        raise ModelError(
            f"{file.label}: {by}{stated}, and the engine computes in {read[0]}: the engine inspector lists "
            f"{layers_shown(layers)}",
            "leave precision= out, or build the engine again" if spec.states_precision else "export the engine again",
            code="engine-precision",
        )
    if stated is None:
        exact = read[0]
        if exact == "fp32":
            exact = known.system.computes_in("fp32") if known.model.op_types & MATRIX_OPERATORS else "fp32"
        known = known.in_precision(exact)
    note = f"{known.computed_in} was read from the engine: {layers_shown(layers)}"
    return known.recorded(note, engine=replace(engine, proved=True), precision=known.shown_precision)


def compared(settings: Settings, known: Known) -> Known:
    """The outputs against the reference. An engine is not trusted before it was seen to compute the same twice."""
    if known.runner is None or known.built is None:
        return known
    doubt = outcome = None
    code: Code = "outputs-unstable"
    with known.alone():
        if not known.running.is_emulation:
            case = known.cases[0]
            doubt = known.running.doubt(known.built, known.runner, case)
            code = "precision-not-applied" if doubt else code
            doubt = doubt or parity.unstable(known.run, case, known.computed_in, bitwise=settings.bitwise)
        if known.request.judges_outputs or doubt:
            # Where a score alone is asked for, one case shows how far off what is doubted is.
            judged = known if known.request.judges_outputs else replace(known, cases=known.cases[:1])
            outcome = parity.judge(judged)
    known = _with_partition(known)
    if outcome is None:
        # Outputs without limits are not held against each other either.
        is_unseen = known.running.is_server and known.request.parity.score is not None
        return known.recorded(*[_SCORE_ALONE] * is_unseen)
    if outcome.record.verdict == "pass":
        known, doubt = _at_once(known, doubt)
    outcome = replace(outcome, record=replace(outcome.record, keep_fp32=known.fewest))
    if doubt is not None:
        outcome = replace(outcome, record=replace(outcome.record, verdict="fail", reason=doubt))
    known = replace(known, outcome=outcome, doubt=doubt, doubt_code=code)
    return known.recorded(*outcome.notes, parity=outcome.record)


def _at_once(known: Known, doubt: str | None) -> tuple[Known, str | None]:
    """Whether requests that are made together give what each gives alone, of what takes several at once."""
    assert known.runner is not None
    with known.alone():
        found = known.running.at_once(known.runner, known.cases)
        known = replace(known, answered=known.run(known.cases[0]) if known.running.is_server else None)
    if found is None:
        return known, doubt
    apart = max(map(parity.apart, found.alone, found.together), default=0.0)
    note = f"{found.note}; an answer lies up to {apart:.3g} from that of the same request alone"
    server = known.record.server
    if server is not None:
        batches = None if found.batches is None else {str(size): count for size, count in found.batches.items()}
        server = replace(server, at_once=len(found.together), difference=apart, batches=batches)
    known = known.recorded(note, server=server)
    return known, doubt or parity.unlike_alone(known, found)


def _with_partition(known: Known) -> Known:
    """With how the system divided the model; what was asked of that and could not be looked at is said."""
    assert known.built is not None
    assert known.runner is not None
    found, most = known.running.partition(known.built, known.runner), known.request.parity.max_subgraphs
    unchecked = () if most is None else (f"max_subgraphs={most} was not checked: {known.running.title}",)
    if found is None:
        return known.recorded(*(f"{said} does not divide a model" for said in unchecked))
    alone = () if found.subgraphs else unchecked
    return known.recorded(*(f"{said} runs node by node" for said in alone), partition=found)


def costed(settings: Settings, known: Known) -> Known:
    """What it takes beside time, once it has run; of an engine that does not run here, what building it told."""
    del settings
    engine = known.record.engine
    found: dict[str, float | None] = {}
    if engine is not None:
        memory = engine.device_memory_bytes
        found |= {"engine_mib": engine.bytes / 2**20, "memory_mib": None if memory is None else memory / 2**20}
        found["build_s"] = engine.build_s if engine.source is None else None
    if known.runner is not None and known.built is not None:
        instances = known.request.latency.instances if known.request.latency else 1
        found |= known.running.costs(known.built, known.runner, instances)
        found["load_ms"] = known.load_ms
    costs = {name: value for name, value in found.items() if value is not None}
    return known.recorded(costs=costs or None)


def scored(settings: Settings, known: Known) -> Known:
    """How well it still does its task; of what does not compute the same twice, nothing can be said."""
    spec = known.request.parity.score
    if spec is None or known.runner is None or known.doubt is not None:
        return known
    settings.progress(f"{known.title}: scoring {plural(len(known.labels), 'case')}")
    score, notes = scoring.judge(known, spec, keeps_items=settings.baselines is not None)
    return known.recorded(*notes, score=score)


def explained(settings: Settings, known: Known) -> Known:
    """Who is to blame for a failure; beside an engine's errors, those that its emulation has."""
    if known.outcome is None or known.doubt is not None:
        return known
    # What a plugin computes, nothing here can compute in pieces.
    if known.outcome.record.verdict == "fail" and not known.outcome.misplaced and not known.plugin_operators:
        if any(map(parity.is_joint, parity.limits_of(known).values())):
            known = known.recorded(
                "not diagnosed: detections are compared as sets, which no tensor inside the model is"
            )
        else:
            known = _blamed(settings, known)
    if known.running.is_emulation or known.is_given or not settings.emulate_too:
        return known
    if computes_the_reference(known.lowered, known.computed_in):
        return known
    with closing(Emulated(known.model, known.lowered, known.computed_in, settings.cache)) as emulated:
        return known.recorded(parity=parity.with_emulation(known, emulated))


def _blamed(settings: Settings, known: Known) -> Known:
    """Who is to blame. What cuts that off (Ctrl-C, a limit on a test's time) still leaves what is known by then."""
    known_by_then = known

    def first(answer: Known) -> None:
        nonlocal known_by_then
        known_by_then = answer

    try:
        return blame.blamed(settings, known, first)
    except BaseException as cut_off:
        if known.request.cut_off is None or isinstance(cut_off, Exception):
            raise
        from pytest_trtcheck.diagnose import verdict

        found = known_by_then.record.parity.blame if known_by_then.record.parity else None
        what = "it had no answer yet" if found is None else f"its first answer, unrefined: {verdict(found)}"
        note = f"the diagnosis was cut off ({first_line(cut_off)}); {what}"
        known.request.cut_off(concluded(settings, known_by_then.recorded(note)).record)
        raise


def watched(settings: Settings, known: Known) -> Known:
    """What the watcher says; what goes wrong there never hides what the check found."""
    watch = known.request.watch
    if watch is None:
        return known
    score, is_kept = known.record.score, known.outcome is not None and known.outcome.record.verdict == "fail"
    if score is not None and is_bad(score.verdict) and not is_kept:
        known = known.recorded(f"no failure bundle holds the score {score.name}: it is code; run the test itself again")
    if known.outcome is None:
        return known
    try:
        with known.alone():
            return known.recorded(*watch(known))
    except CheckError as error:
        note_broken(settings, known.request, error)
        return known.recorded(error.text)


def _refuse_the_same(known: Known, other: ServerRecord | None, precision: Precision) -> None:
    """What a served model is compared with for speed must not be that model itself."""
    own = known.record.server
    if own is not None and other is not None and (own.model, own.version) == (other.model, other.version):
        raise ArgumentError(
            f"min_speedup={{{precision!r}: …}}: the server's model {own.model!r} would be compared with itself",
            "name the models by their precision: --trt-triton-url=http://localhost:8000/{model}_{precision}",
            code="compared-with-itself",
        )


def timed(settings: Settings, known: Known) -> Known:
    """How fast it is; of several systems each is measured, whether a budget holds or not."""
    spec = known.request.latency or (latency.COMPARED if known.request.parity.is_compared else None)
    if spec is None:
        return known

    def load_again() -> Runner:
        assert known.built is not None
        assert known.runner is not None
        known.running.keep(known.built, known.runner)
        return loaded_by(settings, known.running, known.built)

    record = latency.judge(settings, known, spec, lambda name: _rival(settings, known, name), load_again)
    missed = [
        f"{entry.name} was not measured: {entry.text}"
        for entry in record.budgets
        if entry.verdict == "not_measured" != record.verdict and entry.name != BASELINE
    ]
    return known.recorded(*latency.notes(record), *missed, latency=record)


def _rival(settings: Settings, known: Known, name: str) -> latency.Rival:
    """What `min_speedup` compares with: the model's engine in another precision, or another system.

    Raises
    ------
    UnsupportedTargetError
        That can't be measured beside it.
    """
    if name in PRECISIONS:
        builder = known.system.builder
        if builder.name == known.running.name and builder.computes_in(name) == known.computed_in:
            raise UnsupportedTargetError(f"{name} is what was checked itself", code="compared-with-itself")
        if name == "tf32" and (why := why_no_tf32(builder.gpu)):
            raise UnsupportedTargetError(why)
        return _loaded_rival(settings, known, builder, name)
    try:
        system = backends.load(name).find(settings.machine)
    except CheckError as error:
        raise UnsupportedTargetError(error.message, error.hint, code=error.code) from error
    if system.name == known.running.name:
        raise UnsupportedTargetError(f"{system.title} is what was checked itself", code="compared-with-itself")
    if not system.is_timed or system.gpu is None or known.running.gpu is None:
        slow = system if system.gpu is None else known.running
        raise UnsupportedTargetError(f"{slow.title} is not measured on the GPU here", code="gpu-needed")
    precision = known.computed_in
    if system.why_not(precision, known.model.op_types) is not None:
        precision = half_part(precision) or "fp32"
    plain = replace(known.request.parity, precision=(precision,), keep_fp32=(), keep_auto=False, exclude=())
    system.admit(known.model, plain, known.request.build_options)
    rival = _loaded_rival(settings, known, system, precision)
    # One that does not do what it is named after would make a slow rival, and any engine fast.
    with known.alone():
        doubt = system.doubt(rival.built, rival.runner, known.cases[0])
    if doubt is not None:
        rival.runner.close()
        raise UnsupportedTargetError(doubt, code="precision-not-applied")
    return rival


def _loaded_rival(settings: Settings, known: Known, system: Backend, precision: Precision) -> latency.Rival:
    lowered = None if system.is_server else lowered_model(settings, known.request, known.model, precision)
    built = system.build(known.spec(system, lowered, precision), settings.cache)
    runner = loaded_by(settings, system, built)
    _refuse_the_same(known, system.serving(runner), precision)
    return latency.Rival(system, runner, f"{system.title} in {precision}", built)


def kept(settings: Settings, known: Known) -> Known:
    """What running the engine brought is kept beside it."""
    del settings
    if known.runner is not None and known.built is not None:
        known.running.keep(known.built, known.runner)
    return known


def profiled(settings: Settings, known: Known) -> Known:
    """What each layer takes, where latency was measured or it is asked for: last of all, to disturb nothing."""
    engine, runner, measured = known.record.engine, known.runner, known.record.latency
    wanted = settings.time_layers or (measured is not None and measured.samples > 0)
    if not wanted or engine is None or runner is None or known.running.gpu is None:
        return known
    if settings.kept_open is not None:
        return known.recorded(engine=replace(engine, layers_untimed="the engine serves further examples"))
    with known.alone():
        found, disturbed = latency.while_watched(
            known.running.gpu, lambda: known.running.profiled(engine, runner, known.cases[0])
        )
    # What somebody else slowed down says nothing of a layer.
    return known.recorded(engine=replace(engine, layers_untimed=disturbed[0]) if disturbed else found)


def rebuilt(settings: Settings, known: Known) -> Known:
    """What further builds of the engine come to, where they are asked for; the worst of all is what is concluded on."""
    again = (loaded, inspected, compared, scored, costed, timed, profiled)
    return judged_again(settings, known, again, (explained, watched))


def unchanged(settings: Settings, known: Known) -> Known:
    """See that what was read is what the record names: files that were hashed, and inputs that lie in a file.

    Likewise that a server still gives what was compared: it may load another model while it is asked.

    Raises
    ------
    ModelError, InputError
        They were changed meanwhile: nobody knows of which of them the outputs are.
    ServerError
        It does not, within the limits of the check.
    """
    settings.cache.require_same()
    if isinstance(known.cases, list) and any(any(files_behind(case)) for case in known.cases):
        assert known.record.inputs_sha256 is not None
        model_inputs.require_digest(known.cases, model_inputs.digest_of(known.cases), known.record.inputs_sha256)
    if known.answered is not None:
        with known.alone():
            again = known.run(known.cases[0])
        if failure := parity.first_failure(known, again, known.answered):
            raise ServerError(
                f"{known.running.title} answers otherwise than when it was compared: {failure}",
                "let nothing load another model there while it is checked; then run the test again",
                code="model-changed",
            )
    return known


def concluded(settings: Settings, known: Known) -> Known:
    """The verdict, and what is to be read first; under `--trt-require-gpu`, what no GPU ran or measured fails."""
    known = known.recorded(verdict=combine([part.verdict for part in known.record.parts.values()]))
    return known.recorded(**message.conclusion(known, require_gpu=settings.require_gpu))


def proved(settings: Settings, known: Known) -> Known:
    """Under `--trt-require-evidence`, whether the same check passed on a GPU: what did not, fails."""
    if settings.evidence is None:
        return known
    model = settings.judged_gpu()
    assert model is not None
    spec = known.request.latency
    limits = latency.budgets_for(spec, model, settings.extra_gpus).limits if spec else {}
    built_by = " ".join(next(iter(known.system.versions().items()))) if known.built and known.system.builds else None
    wanted = evidence.Wanted(known.record, model, limits, built_by, settings.extra_gpus)
    found = evidence.proof(wanted, settings.evidence)
    if not isinstance(found, str):
        return known.recorded(proof=found)
    reason = f"--trt-require-evidence={settings.evidence.file}: {found}"
    if is_bad(known.record.verdict):
        return known.recorded(reason)
    message = "\n".join(filter(None, (reason, known.record.message)))
    return known.recorded(verdict="fail", message=message, code="evidence-required")
