"""What turns sound input into hostile input: bytes, JSON values, protobuf messages and Python literals."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

LONG = "n" * 1_000_000
TEXTS = (
    *("", " ", "\0", "x", "nan", "inf", "0", "-1", "true", "null", "*", "**", "[", "{}", "%s", "~", "~nobody/x"),
    *("../victim", "../../victim", "/dev/zero", "/dev/stdin", "/proc/self/mem", "C:\\x", "a/b\\c", "x" * 300),
    *("\x1b]0;title\x07", "\u202e", "\ud800", "é", "e\u0301", "\U0001f600", "a\nb", "a\tb", "'", '"', "<script>"),
)
INTEGERS = (*(0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, -(2**31)),)
LARGE = (2**40, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64, 10**30)
FLOATS = (
    0.0,
    -0.0,
    1e-45,
    1e-7,
    0.5,
    1.0,
    -1.0,
    65504.0,
    65536.0,
    3e38,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)


def integer(draw: Random) -> int:
    return draw.choice((*INTEGERS, *LARGE, draw.randrange(100)))


def text(draw: Random) -> str:
    return (
        draw.choice((*TEXTS, LONG)) if draw.random() < 0.9 else "".join(map(chr, draw.choices(range(32, 0x3000), k=9)))
    )


# --- bytes -----------------------------------------------------------------------------------------------------------


def of_bytes(data: bytes, draw: Random) -> bytes:
    """Flipped, cut off, cut out, repeated, overwritten with numbers that mean much, padded; one to eight times."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        # What stands at the beginning of a file says most about it.
        place = draw.randrange(len(found) + 1) if draw.random() < 0.5 else draw.randrange(min(len(found), 200) + 1)
        end = place + draw.choice((1, 2, 4, 8, 64, 1024))
        kind = draw.randrange(7)
        if kind == 0 and place < len(found):
            found[place] = draw.randrange(256)
        elif kind == 1 and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del found[place:]
        elif kind == 3:
            del found[place:end]
        elif kind == 4:
            found[place:place] = found[place:end] * draw.choice((1, 2, 100))
        elif kind == 5:
            width = draw.choice((1, 2, 4, 8))
            number = draw.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1)))
            found[place : place + width] = number.to_bytes(width, draw.choice(("little", "big")))
        else:
            found[place:place] = draw.randbytes(draw.choice((1, 8, 256)))
    return bytes(found)


# --- JSON ------------------------------------------------------------------------------------------------------------


def json_value(draw: Random, depth: int = 0) -> Any:
    """Any value; a list or mapping now and then, and one that is nested deeply."""
    makers: tuple[Callable[[], Any], ...] = (
        lambda: draw.choice((None, True, False)),
        lambda: integer(draw),
        lambda: draw.choice(FLOATS),
        *(lambda: text(draw),) * 3,
        lambda: [json_value(draw, depth + 1) for _ in range(draw.choice((0, 1, 3)))],
        lambda: {text(draw): json_value(draw, depth + 1) for _ in range(draw.choice((0, 1, 3)))},
        lambda: _nested(draw),
    )
    return draw.choice(makers if depth < 2 else makers[:6])()


def _nested(draw: Random) -> Any:
    found: Any = draw.choice(([], {}))
    for _ in range(draw.choice((2, 30, 400))):
        found = [found] if draw.random() < 0.5 else {"a": found}
    return found


def of_json(document: Any, draw: Random, times: int | None = None) -> Any:
    """A copy with one to four places changed: another value, gone, twice, under another name, or swapped."""
    found = [copy.deepcopy(document)]
    for _ in range(times or draw.choice((1, 1, 1, 2, 4))):
        if not (places := list(_places(found))):
            break
        holder, key = draw.choice(places)
        kind = draw.randrange(7)
        if kind == 0 and holder is not found:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 2 and isinstance(holder, dict):
            holder[draw.choice((text(draw), draw.choice(list(holder))))] = holder.pop(key)
        elif kind == 3:
            other, at = draw.choice(places)
            try:
                holder[key] = copy.deepcopy(other[at])
            except (KeyError, IndexError):
                continue
        else:
            holder[key] = _near(holder[key], draw) if draw.random() < 0.5 else json_value(draw)
    return found[0]


def _near(value: Any, draw: Random) -> Any:
    """Something of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, -value, value * 2**20, integer(draw)))
    if isinstance(value, float):
        return draw.choice((value * 2, value / 1e6, -value, *FLOATS))
    if isinstance(value, str):
        cut = draw.randrange(len(value) + 1)
        return draw.choice(
            (value[:cut] + value[cut + 1 :], value[:cut] + text(draw) + value[cut:], text(draw), value * 2)
        )
    return json_value(draw)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def json_text(document: Any, draw: Random) -> bytes:
    """The document, changed, as a file has it; some of the files are no JSON any more."""
    changed = of_json(document, draw) if draw.random() < 0.85 else document
    raw = json.dumps(changed, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        return raw.replace(b"0", draw.choice((b"1e999", b"9" * 5000, b"-0", b"NaN", b"[" * 100_000)), 1)
    return of_bytes(raw, draw) if changed is document else raw


# --- protobuf --------------------------------------------------------------------------------------------------------


def of_message(message: Any, draw: Random, words: tuple[str, ...] = (), times: int | None = None) -> None:
    """Change one to four fields anywhere in a protobuf message; `words` are names that may stand in it.

    A name that stands elsewhere in the message is the likeliest new one: what refers to something then refers to
    something else.
    """
    for _ in range(times or draw.choice((1, 1, 1, 2, 4))):
        spots = list(_fields(message))
        if not spots:
            return
        names = [value for owner, field in spots for value in _values(owner, field) if isinstance(value, str)]
        owner, field = draw.choice(spots)
        try:
            _change(owner, field, draw, (*names[:400], *words))
        except (ValueError, TypeError, AttributeError, OverflowError, IndexError):
            continue  # protobuf itself refuses it


def _fields(message: Any) -> Iterator[tuple[Any, Any]]:
    for field in message.DESCRIPTOR.fields:
        held = _values(message, field)
        if held or draw_absent(field):
            yield message, field
        if field.cpp_type == field.CPPTYPE_MESSAGE:
            for each in held:
                yield from _fields(each)


def draw_absent(field: Any) -> bool:
    """Whether a field that is not there is worth setting: numbers and texts, not whole graphs."""
    return bool(field.cpp_type != field.CPPTYPE_MESSAGE)


def _repeated(field: Any) -> bool:
    found = getattr(field, "is_repeated", None)
    return bool(field.label == field.LABEL_REPEATED if found is None else found)


def _values(message: Any, field: Any) -> list[Any]:
    value = getattr(message, field.name)
    if _repeated(field):
        return list(value)
    return [value] if field.cpp_type != field.CPPTYPE_MESSAGE or message.HasField(field.name) else []


def _change(owner: Any, field: Any, draw: Random, names: tuple[str, ...]) -> None:
    if not _repeated(field):
        if draw.random() < 0.15:
            owner.ClearField(field.name)
        elif field.cpp_type != field.CPPTYPE_MESSAGE:
            setattr(owner, field.name, _scalar(field, getattr(owner, field.name), draw, names))
        return
    values = getattr(owner, field.name)
    kind = draw.randrange(6)
    if kind == 0 and values:
        del values[draw.randrange(len(values))]
    elif kind == 1 and values:
        again = draw.choice(list(values))
        values.extend([again] * draw.choice((1, 1, 1, 2, 300)))
    elif kind == 2 and len(values) > 1:
        first, second = draw.sample(range(len(values)), 2)
        order = [copy.deepcopy(each) for each in values]
        order[first], order[second] = order[second], order[first]
        del values[:]
        values.extend(order)
    elif kind == 3 and draw.random() < 0.3:
        del values[:]
    elif field.cpp_type == field.CPPTYPE_MESSAGE:
        if len(values) > 1:
            draw.choice(list(values)).CopyFrom(copy.deepcopy(draw.choice(list(values))))
    elif values and draw.random() < 0.8:
        place = draw.randrange(len(values))
        values[place] = _scalar(field, values[place], draw, names)
    else:
        values.append(_scalar(field, None, draw, names))


def _scalar(field: Any, value: Any, draw: Random, names: tuple[str, ...]) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return of_bytes(value or b"", draw)
        return draw.choice(names) if names and draw.random() < 0.7 else text(draw)
    if field.cpp_type in {field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE}:
        return draw.choice(FLOATS)
    if isinstance(value, int) and draw.random() < 0.4:
        return value + draw.choice((1, -1, 2, value, -value))
    return integer(draw)


# --- Python literals -------------------------------------------------------------------------------------------------


def literal(draw: Random, depth: int = 0) -> str:
    """The source of a value that somebody may give as an argument."""
    choices: tuple[Callable[[], str], ...] = (
        lambda: repr(integer(draw)),
        lambda: draw.choice(("0.5", "-1.0", "1e400", "float('nan')", "float('-inf')", "1e-300", "True", "None", "...")),
        lambda: repr(draw.choice(TEXTS)),
        lambda: draw.choice(("object()", "print", "lambda *a: a", "int", "Exception", "NotImplemented", "b'x'", "1j")),
        lambda: draw.choice(("range(3)", "iter([])", "(x for x in 'ab')", "{1, 2}", "frozenset()", "np.zeros(3)")),
        lambda: draw.choice(("np.float32(1)", "np.array('x')", "np.array(None)", "RECURSIVE")),
        lambda: draw.choice(("Bad()", "Endless()", "Unending()")),
        lambda: f"[{', '.join(literal(draw, depth + 1) for _ in range(draw.randrange(4)))}]",
        lambda: f"({''.join(literal(draw, depth + 1) + ', ' for _ in range(draw.randrange(4)))})",
        lambda: (
            f"dict([{', '.join(f'({hashable(draw)}, {literal(draw, depth + 1)})' for _ in range(draw.randrange(3)))}])"
        ),
    )
    return draw.choice(choices[:7] if depth > 2 else choices)()


def hashable(draw: Random) -> str:
    return draw.choice(
        (repr(draw.choice(TEXTS)), repr(integer(draw)), "None", "(1, 2)", "1.5", "'T4'", "'default'", "'y'")
    )
