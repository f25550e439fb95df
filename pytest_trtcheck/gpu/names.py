"""GPU names: what a user, a budget or a driver calls a GPU, and which budget fits which GPU.

A name is a product ("T4", "RTX 4090", "NVIDIA A100-SXM4-80GB"), a compute capability ("sm75", "7.5") or an
architecture ("turing"). Case, spaces and hyphens do not matter; neither do the parts of a driver's name that tell
memory size and form factor, so every A100 is an "A100". What makes another chip or another power class is part of the
product: an "L40S" is no "L40" and a "RTX 4090 Laptop" no "RTX 4090". Whoever must tell the H100's form factors apart
declares them (`trt_gpus`, see `parse_extra_gpus`).

A MIG slice is a product of its own, named with its profile ("A100 MIG 1g.5gb"). A budget for the whole card never
applies to it, since a slice has a fraction of the card; budgets by compute capability or architecture do apply, since
those speak of a kind and not of a size.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from pytest_trtcheck.errors import ArgumentError, GpuError, alike
from pytest_trtcheck.gpu.table import (
    ARCHITECTURE_ALIASES,
    ARCHITECTURES,
    LOWEST,
    ComputeCapability,
    GpuModel,
    architecture_of,
    builtin_models,
    canonical,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Value = TypeVar("Value")

DEFAULT_KEY = "default"

_HOW_TO_ADD = "add a line of your own to the ini key trt_gpus, `{name} = X.Y` with the GPU's compute capability for X.Y"
_SYNTAX = "a line of trt_gpus reads `Name = 8.7`, `Name = 8.7, ampere` or `Name = 8.7, ampere, alias 1|alias 2`"

_VENDOR_WORDS = frozenset({"nvidia", "geforce", "tesla", "jetson", "gpu", "graphics", "corporation", "nvgpu"})
_FORM_WORDS = re.compile(
    r"\d+gb?|gb|sxm\d*|pcie|nvl\d*|hbm\d*e?|dgxs|ac|developer|kit|module|generation|edition|workstation|server"
    r"|blackwell|lovelace"
)
_COMPUTE_CAPABILITY = re.compile(r"(?:(?:sm|compute|cc)[ _-]?(\d{1,2})\.?(\d)[af]?|(\d{1,2})\.(\d))", re.IGNORECASE)
_MIG = re.compile(
    r"(?P<card>.*?)[\s_-]*\bMIG[\s_-]+(?P<profile>(?:\d+c\.)?\d+g\.\d+gb(?:[+-][a-z.]+)*)\s*", re.IGNORECASE
)


def find_gpu(name: str, extra: Sequence[GpuModel] = ()) -> GpuModel:
    """The GPU that a user means: a product, a compute capability or an architecture.

    Raises
    ------
    GpuError
        When the name is unknown; the hint lists the nearest names and says how to add one.
    """
    if found := _find(name, extra):
        return found
    card = card_of(name).strip()
    if re.search(r"\bMIG\b", name, re.IGNORECASE) and card in {"", name.strip()}:
        what = "a MIG slice is named by its card and its profile, as in 'A100 MIG 1g.5gb'"
        raise GpuError(f"unknown GPU {name!r}", f"{what}; `nvidia-smi -L` lists them", code="gpu-unknown")
    near = _suggestions(name, extra)
    hint = f"did you mean {', '.join(near)}? Otherwise " if near else ""
    raise GpuError(f"unknown GPU {name!r}", hint + _HOW_TO_ADD.format(name=card or "MyBoard"), code="gpu-unknown")


def model_of(name: str, compute_capability: ComputeCapability, extra: Sequence[GpuModel] = ()) -> GpuModel:
    """The model of a real GPU, from the name and compute capability that the driver reports.

    A GPU that is in no table is a product of its own name, which budgets by compute capability, architecture and
    "default" still fit. So is one whose name is in the table with another compute capability: the name then means
    another GPU.
    """
    compute_capability = canonical(compute_capability)
    found = _find_product(name, extra)
    if found is not None and found.compute_capability == compute_capability:
        return found
    product = " ".join(word for word in name.split() if word.lower() not in _VENDOR_WORDS) or name
    return GpuModel(product, compute_capability, architecture_of(compute_capability))


def card_of(name: str) -> str:
    """The name of the card that a MIG slice is of; any other name as it is."""
    slice_ = _MIG.fullmatch(name)
    return slice_["card"] if slice_ else name


def fits(key: GpuModel, gpu: GpuModel) -> int | None:
    """How specifically `key` names `gpu`: 0 its product, 1 its family, 2 compute capability, 3 architecture.

    None where it does not name it.
    """
    if key.level == "product":
        if gpu.level != "product":
            return None
        return 0 if key.product == gpu.product else 1 if key.product == gpu.family else None
    if key.level == "compute_capability":
        return 2 if key.compute_capability == gpu.compute_capability else None
    return 3 if key.architecture == gpu.architecture else None


def pick(
    mapping: Mapping[str, Value], gpu: GpuModel | None, extra: Sequence[GpuModel] = ()
) -> tuple[str, Value] | None:
    """The entry for a GPU: by product, else family, compute capability, architecture, or "default".

    None is a GPU that is not known: "default" alone fits it.

    Returns
    -------
    The key as it is written in `mapping`, and its value; None where no entry fits.
    """
    best: tuple[int, str] | None = None
    for key in mapping:
        rank = 4 if _is_default(key) else fits(find_gpu(key, extra), gpu) if gpu else None
        if rank is not None and (best is None or rank < best[0]):
            best = rank, key
    return None if best is None else (best[1], mapping[best[1]])


def check_budget_keys(mapping: Mapping[str, object], extra: Sequence[GpuModel] = ()) -> None:
    """Check that every key names a GPU, and no two keys the same one.

    Raises
    ------
    ArgumentError
        Naming the key; the hint lists the nearest names.
    """
    seen: dict[tuple[str, str], str] = {}
    for key in mapping:
        if not isinstance(key, str):
            raise ArgumentError(f"{key!r} names no GPU", 'a key is a text such as "T4", "sm75", "turing" or "default"')
        if _is_default(key):
            identity = (DEFAULT_KEY, DEFAULT_KEY)
        else:
            try:
                found = find_gpu(key, extra)
            except GpuError as error:
                raise ArgumentError(error.message, error.hint, code=error.code) from None
            identity = (found.level, found.product)
        if identity in seen:
            raise ArgumentError(
                f"{seen[identity]!r} and {key!r} name the same GPU", "keep one of the two", code="argument-conflict"
            )
        seen[identity] = key


def parse_extra_gpus(lines: Iterable[str]) -> tuple[GpuModel, ...]:
    """GPUs of the user's own, from lines such as `MyBoard = 8.7, ampere, alias 1|alias 2`.

    The architecture may be left out where it follows from the compute capability. A name that would otherwise be read
    as a known product ("H100 PCIe" as "H100") is the more specific of the two: that product's budgets still fit it
    where there is none for the name itself. Empty lines and lines that begin with "#" are skipped.

    Raises
    ------
    ArgumentError
        Naming the line and what is wrong with it.
    """
    models: list[GpuModel] = []
    for line in (raw.strip() for raw in lines):
        if line and not line.startswith("#"):
            models.append(_parse_extra(line, models))
    return tuple(models)


def _parse_extra(line: str, before: Sequence[GpuModel]) -> GpuModel:
    name, equals, rest = (part.strip() for part in line.partition("="))
    capability_text, _, rest = (part.strip() for part in rest.partition(","))
    architecture, _, alias_text = (part.strip() for part in rest.partition(","))
    if not (name and equals and capability_text):
        raise ArgumentError(f"trt_gpus: cannot read {line!r}", _SYNTAX, code="option-value")
    capability = _parse_compute_capability(capability_text)
    if capability is None:
        raise ArgumentError(
            f"trt_gpus: {capability_text!r} in {line!r} is no compute capability",
            "write it as in 8.7 or sm87",
            code="option-value",
        )
    known = architecture_of(capability)
    architecture = _architecture_name(architecture) or known
    if architecture == "unknown":
        raise ArgumentError(
            f"trt_gpus: {line!r} names no architecture, and none is known for {capability_text}",
            f"write it behind the compute capability, as in `{name} = {capability_text}, ampere`",
            code="option-value",
        )
    if known not in ("unknown", architecture):
        raise ArgumentError(
            f"trt_gpus: {line!r} says {architecture}, but compute capability {capability_text} is {known}",
            "correct one of the two, or leave the architecture out",
            code="option-value",
        )
    aliases = tuple(alias for part in alias_text.split("|") if (alias := part.strip()))
    family: str | None = None
    for text in (name, *aliases):
        if not _key(text):
            raise ArgumentError(
                f"trt_gpus: {text!r} in {line!r} names no GPU",
                "give it a name that tells it apart",
                code="option-value",
            )
        clash = _reserved(text) or _exact(text, (*before, *builtin_models()))
        if clash is not None:
            raise ArgumentError(
                f"trt_gpus: {text!r} in {line!r} already means {clash}", "choose another name", code="option-value"
            )
        general = _lookup(_key(text, without_form=True), builtin_models())
        if general is not None and general.compute_capability == capability:
            family = general.product
    return GpuModel(name, capability, architecture, aliases=aliases, family=family)


def _find(name: str, extra: Sequence[GpuModel]) -> GpuModel | None:
    capability = _parse_compute_capability(name)
    if capability is not None:
        known = next((model for model in extra if model.compute_capability == capability), None)
        architecture = known.architecture if known else ARCHITECTURES.get(capability)
        if architecture is None:
            return None
        return GpuModel("sm{}{}".format(*capability), capability, architecture, level="compute_capability")
    architecture = _architecture_name(name)
    if architecture in LOWEST or architecture in {model.architecture for model in extra}:
        members = {cc for cc, arch in ARCHITECTURES.items() if arch == architecture}
        members |= {cc for model in extra if model.architecture == architecture and (cc := model.compute_capability)}
        return GpuModel(architecture, members.pop() if len(members) == 1 else None, architecture, level="architecture")
    return _find_product(name, extra)


def _find_product(name: str, extra: Sequence[GpuModel]) -> GpuModel | None:
    if slice_ := _MIG.fullmatch(name):
        card = _find_product(slice_["card"], extra)
        if card is None:
            return None
        return replace(card, product=f"{card.product} MIG {slice_['profile'].lower()}", aliases=(), family=None)
    # A user's own names go first at each step, so that they can single out what the table takes together.
    keys = (_key(name), _key(name, without_form=True))
    found = (_lookup(key, models) for key in keys for models in (extra, builtin_models()))
    return next(filter(None, found), None)


def _lookup(key: str, models: Sequence[GpuModel]) -> GpuModel | None:
    if not key:
        return None
    if models is builtin_models():
        return _builtin_index().get(key)
    return next((model for model in models if key in {_key(text) for text in (model.product, *model.aliases)}), None)


@cache
def _builtin_index() -> dict[str, GpuModel]:
    return {_key(text): model for model in builtin_models() for text in (model.product, *model.aliases)}


def _words(name: str) -> list[str]:
    return [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in _VENDOR_WORDS]


def _key(name: str, *, without_form: bool = False) -> str:
    """What of a name counts: lower case, no punctuation, without vendor (and form factor) words."""
    return "".join(word for word in _words(name) if not (without_form and _FORM_WORDS.fullmatch(word)))


def _parse_compute_capability(text: str) -> ComputeCapability | None:
    match = _COMPUTE_CAPABILITY.fullmatch(text.strip())
    if match is None:
        return None
    major, minor = (match[1], match[2]) if match[1] else (match[3], match[4])
    return canonical((int(major), int(minor)))


def _architecture_name(text: str) -> str:
    key = re.sub(r"[^a-z0-9]", "", text.lower())
    return ARCHITECTURE_ALIASES.get(key, key)


def _is_default(key: str) -> bool:
    return key.strip().lower() == DEFAULT_KEY


def _reserved(text: str) -> str | None:
    if _is_default(text):
        return "every GPU without a budget of its own"
    if _parse_compute_capability(text) is not None:
        return "a compute capability"
    if _architecture_name(text) in LOWEST:
        return "an architecture"
    return "a MIG slice" if _MIG.fullmatch(text) else None


def _exact(text: str, models: Sequence[GpuModel]) -> str | None:
    found = _lookup(_key(text), models)
    return None if found is None else f"the {found.product}"


def _suggestions(name: str, extra: Sequence[GpuModel], most: int = 5) -> list[str]:
    """Names that contain every word of `name`, then those that are spelled alike."""
    products = [model.product for model in (*extra, *builtin_models())]
    words = set(_words(name))
    within = [product for product in products if words and words <= set(_words(product))]
    candidates = {_key(text): text for text in (*products, *LOWEST, *("sm{}{}".format(*cc) for cc in ARCHITECTURES))}
    return list(dict.fromkeys((*within, *alike(_key(name), candidates, most))))[:most]
