"""Constants of the physics, fitted to the recordings. Written by ``python -m wattlock_simulator.fit``."""

from __future__ import annotations

from wattlock_simulator.curves import DecodeCurve, PrefillCurve

STREAM_EXPONENT = 1.35
"""How power rises with the share of a decode step that streams state or cache."""

JOULES_PER_TOKEN: dict[str, float] = {
    "H200": 0.0115,
    "H100": 0.012,
}
"""Energy of the arithmetic of one generated token, in J, by product."""

DECODE: dict[tuple[str, str], DecodeCurve] = {
    ("H200", "GQA"): DecodeCurve(0.003285, 1.7056e-06, 3.2732e-08, 406.82, 388.86),
    ("H200", "MLA"): DecodeCurve(0.0047989, 1.0089e-06, 3.07e-08, 429.47, 288.59),
    ("H200", "GatedDeltaNet"): DecodeCurve(0.0048689, 0.00030576, 0, 328.42, 313.47),
    ("H200", "Mamba2"): DecodeCurve(0.0042576, 0.0003132, 0, 368.8, 253.55),
    ("H100", "GQA"): DecodeCurve(0.0039206, 3.1276e-06, 4.7863e-08, 375.27, 260.22),
    ("H100", "MLA"): DecodeCurve(0.0058009, 1.8186e-06, 4.2214e-08, 404.06, 198.6),
    ("H100", "GatedDeltaNet"): DecodeCurve(0.0054901, 0.00037079, 0, 334.79, 244.7),
    ("H100", "Mamba2"): DecodeCurve(0.0049389, 0.00036159, 0, 363.71, 234.49),
}
"""By product and architecture."""

PREFILL: dict[tuple[str, str], PrefillCurve] = {
    ("H200", "GQA"): PrefillCurve(20826, 0.72211, 939.5),
    ("H200", "MLA"): PrefillCurve(33024, 1.0118, 919.23),
    ("H200", "GatedDeltaNet"): PrefillCurve(27372, 0, 934.34),
    ("H200", "Mamba2"): PrefillCurve(24072, 0, 964),
    ("H100", "GQA"): PrefillCurve(22179, 0.58478, 949.75),
    ("H100", "MLA"): PrefillCurve(35428, 0.65321, 977.1),
    ("H100", "GatedDeltaNet"): PrefillCurve(28732, 0, 931.14),
    ("H100", "Mamba2"): PrefillCurve(24687, 0, 997.11),
}
"""By product and architecture."""
