"""Makes odd inputs out of good ones, from a seed: the same seed and number give the same input."""

import copy
import json
import re
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**30, 0.1, -0.0, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "0",
        "-1",
        "1e999",
        "NaN",
        "9" * 400,
        "x" * 5_000,
        "\0",
        "é\u202e",
        "\ud800",
    ),
    *(
        "\ud800",
        "Decode",
        "Enforce",
        "2026-13-45T99:99:99Z",
        "2026-11-23T12:00:00+99:00",
        "2026-11-23T12:00:00",
        "GPU-0",
    ),
    *([], {}, [None], [[]], {"": None}, ["x"] * 300, {str(number): number for number in range(300)}),
)


def _deep(random: Random) -> Any:
    value: Any = random.choice(ODD_VALUES)
    for _ in range(random.choice((3, 20, 60))):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    if isinstance(value, dict):
        for key in value:
            found.append((value, key))
            _places(value[key], found)
    elif isinstance(value, list):
        for index in range(len(value)):
            found.append((value, index))
            _places(value[index], found)


def odd_json(good: Any, random: Random) -> Any:
    """Return a copy of ``good`` with one to four places changed, dropped, doubled or swapped."""
    value = copy.deepcopy(good)
    for _ in range(random.choice((1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        _places(value, places)
        if not places:
            return random.choice(ODD_VALUES)
        holder, key = random.choice(places)
        kind = random.random()
        if kind < 0.6:
            holder[key] = copy.deepcopy(random.choice(ODD_VALUES))
        elif kind < 0.7:
            del holder[key]
        elif kind < 0.75:
            holder[key] = _deep(random)
        elif kind < 0.85 and isinstance(holder, list):
            holder.extend(copy.deepcopy(holder[key]) for _ in range(random.choice((1, 3, 400))))
        elif kind < 0.9 and isinstance(holder, dict):
            holder[random.choice(("unknown", "", "\ud800", "x" * 300))] = copy.deepcopy(random.choice(ODD_VALUES))
        else:
            other, at = random.choice(places)
            holder[key] = copy.deepcopy(other[at]) if _has(other, at) else None
    return value


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


_NUMBER = re.compile(rb"(?<= )[0-9][0-9.e+]*")
_ODD_NUMBERS = (b"-1", b"NaN", b"+Inf", b"-Inf", b"1e999", b"1e308", b"1e-400", b"0x10", b"1_0", b"", b"7", b"9" * 400)
_ODD_BYTES = (b"\0", b"\n", b"\r\n", b"{", b"}", b'"', b"\\", b"#", b" ", b"NaN", b"-1", b"1e999", b"+Inf", b"\xff")
_ODD_BYTES += (b"9" * 400, b"x" * 20_000, b"\n" * 500, b'{a="' * 200, b"\\\\" * 500, b"# EOF\n", b"<html>")


def odd_bytes(good: bytes, random: Random) -> bytes:
    """Return ``good`` with one to six places changed, cut out, doubled or moved."""
    value = bytearray(good)
    for _ in range(random.choice((1, 1, 2, 6))):
        at, until = sorted(random.randrange(len(value) + 1) for _ in range(2))
        near = min(until, at + random.choice((1, 4, 40)))
        kind = random.random()
        number = _NUMBER.search(value, at) if kind < 0.15 else None
        if number is not None:
            value[number.start() : number.end()] = random.choice(_ODD_NUMBERS)
        elif kind < 0.3:
            value[at:near] = random.choice(_ODD_BYTES)
        elif kind < 0.45:
            value[at:near] = random.randbytes(near - at)
        elif kind < 0.6:
            value[at:at] = random.choice(_ODD_BYTES)
        elif kind < 0.7:
            del value[at:near]
        elif kind < 0.8:
            del value[at:until]
        elif kind < 0.9:
            value[at:at] = value[at:near] * random.choice((1, 2, 200))
        else:
            del value[at:]
    return bytes(value)


def as_the_api_server_sends_it(value: Any) -> Any:
    """Return what comes out of a JSON parser, or ``None`` for what is no JSON (numbers that are not finite).

    The API server is written in Go, whose parser lets no half of a surrogate pair through.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode(errors="replace"))
    except ValueError:
        return None
