"""What the hardware tier concludes, on recordings made up so that the truth is known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from evaluate import CallFigures, Check, Findings, Overhead, Phase, PhaseFigures, Recording, evaluate
from report import headline, page_text, write_report

UUID = "GPU-0"
WATTS = 600.0
STEP_TOKENS = 32
TOKENS_PER_SECOND = 100.0 * STEP_TOKENS


def published(at, holder, joules, **instance):
    return {
        "atSeconds": at,
        "writtenSeconds": at,
        "passes": int(at),
        "passSeconds": at * 0.005,
        "cpuSeconds": at * 0.008,
        "memoryMiB": {"anonymous": 40.0, "file": 30.0},
        "smMHz": {UUID: 1980},
        "clockWrites": 0,
        "status": {
            "gpus": [
                {
                    "uuid": UUID,
                    "state": "Observing",
                    "holder": {"name": holder},
                    "energyJoules": str(joules),
                    "limiters": {"powerCapSeconds": "0"},
                }
            ],
            "instances": [{"pool": holder.removesuffix("-0"), "computesPrompts": False} | instance],
        },
    }


def recording(**changes):
    progress = [(100 + n * 0.1, n * 10) for n in range(601)]
    turns = [(n % 4 in (0, 3), 200 + 4.0 * n, 204 + 4.0 * n) for n in range(24)]
    samples = "\n".join(f"{90 + n * 0.02:.2f},{WATTS * 1000:.0f},0,,1980,0" for n in range(4000))
    made = Recording(
        product="NVIDIA H200",
        versions={"driver": "580.159.04", "nvml": "13.580"},
        limit_watts=700,
        uuid=UUID,
        torch="2.11",
        phases=[Phase("decode B32 L4096", "decode", 100.0, 160.0, STEP_TOKENS, progress)],
        turns=turns,
        progress=[(200 + n * 0.05, n) for n in range(2001)],
        published=[
            published(
                at + 0.3,
                "decode-0",
                (at - 100) * WATTS,
                tokensPerSecond=str(TOKENS_PER_SECOND),
                joulesPerGeneratedToken=str(WATTS / TOKENS_PER_SECOND),
            )
            for at in range(100, 300)
        ],
        samples="t,instant_mw,average_mw,energy_mj,sm_mhz,reasons\n" + samples,
        calls={
            "functions": {"nvmlDeviceGetUUID": {"codes": {"0": 3}, "latenciesMicroseconds": [1.0, 2.0, 9.0]}},
            "fields": {"186": {"0": 60}, "230": {"3": 1}},
            "missing": [],
            "refused": [],
            "mayWrite": False,
        },
        reports=3,
    )
    return replace(made, **changes)


def broken(findings):
    return [check.text for check in findings.checks if check.holds is False]


def not_made(findings):
    return [check.text for check in findings.checks if check.holds is None]


def test_a_run_as_it_should_be_passes_every_check():
    findings = evaluate(recording())
    assert broken(findings) == not_made(findings) == []
    assert headline(findings) == "12 of 12 checks hold"
    phase = findings.phases[0]
    assert phase.watts == pytest.approx(WATTS)
    assert phase.independent_watts == pytest.approx(WATTS)
    assert phase.independent_joules_per_token == pytest.approx(WATTS / TOKENS_PER_SECOND, rel=1e-3)
    assert phase.sm_mhz == phase.independent_sm_mhz == 1980
    assert findings.overhead.slowdown_percent == pytest.approx(0, abs=0.1)
    assert [(each.name, each.supported) for each in findings.fields] == [("186", True), ("230", False)]


def test_energy_that_is_two_percent_off_is_found():
    lines = [published(at + 0.3, "decode-0", (at - 100) * WATTS * 1.02) for at in range(100, 300)]
    findings = evaluate(recording(published=lines))
    assert any("worst phase 2.00 %" in text for text in broken(findings))


@pytest.mark.parametrize(
    ("instance", "complaint"),
    [
        ({"tokensPerSecond": "3300", "joulesPerGeneratedToken": "0.1875"}, "tokens per second differ by +3.1"),
        ({"tokensPerSecond": "3200", "joulesPerGeneratedToken": "0.2"}, "joules per token differ by +6.6"),
        ({}, "tokens per second differ by +inf"),
        ({"tokensPerSecond": "3200", "joulesPerGeneratedToken": "0.1875", "computesPrompts": True}, "no false alarm"),
    ],
)
def test_wrong_numbers_of_the_agent_are_found(instance, complaint):
    lines = [published(at + 0.3, "decode-0", (at - 100) * WATTS, **instance) for at in range(100, 300)]
    assert any(complaint in text for text in broken(evaluate(recording(published=lines))))


def test_a_write_a_lock_or_a_capability_is_found():
    calls = recording().calls | {"refused": ["nvmlDeviceSetGpuLockedClocks"], "mayWrite": True}
    line = recording().published[-1] | {"clockWrites": 1}
    line["status"]["gpus"][0]["state"] = "Locked"
    texts = broken(evaluate(recording(calls=calls, published=[*recording().published, line])))
    assert len(texts) == 4, texts
    assert "nvmlDeviceSetGpuLockedClocks" in texts[0]


def test_an_agent_that_slows_the_load_is_found():
    slow, done = [], 0.0
    for n in range(2001):
        at = 200 + n * 0.05
        running = int((at - 200) / 4) % 4 in (0, 3)
        slow.append((at, done))
        done += 0.95 if running else 1.0
    findings = evaluate(recording(progress=slow))
    assert findings.overhead.slowdown_percent == pytest.approx(5, abs=0.5)
    assert any("slower while the agent runs" in text for text in broken(findings))


def test_the_report_tells_it_all_and_no_identity(tmp_path: Path):
    page = write_report(evaluate(recording()), tmp_path)
    assert page.name == "nvidia-h200-driver-580.159.04.md"
    assert {each.suffix for each in tmp_path.iterdir()} == {".md", ".png", ".json"}
    for each in (page, page.with_suffix(".json")):
        text = each.read_text()
        assert UUID not in text
        assert "decode B32 L4096" in text
    assert "| `nvmlDeviceGetUUID` | 3 | yes | ok 3 | 2.0 | 9.0 | 9.0 |" in page.read_text()


def test_a_cap_that_only_the_bit_tells_of_is_found():
    capped = recording().samples.replace(",1980,0", ",1980,4")
    assert any("time at the power cap" in text for text in broken(evaluate(recording(samples=capped))))


def test_a_phase_that_did_not_fit_is_told_in_the_headline_and_its_checks_are_not_made(tmp_path):
    did_not_fit = Phase("decode B48 L4096", "decode", 160.0, 160.0, 0, [], note="does not fit into the GPU's memory")
    findings = evaluate(recording(phases=[*recording().phases, did_not_fit]))
    assert broken(findings) == []
    assert not_made(findings) == [
        "decode B48 L4096: tokens per second",
        "decode B48 L4096: joules per token",
        "decode B48 L4096: no false alarm about its role",
    ]
    told = "12 of 15 checks made, 12 hold; not measured: decode B48 L4096 (does not fit into the GPU's memory)"
    assert headline(findings) == told
    text = write_report(findings, tmp_path).read_text()
    assert f"({told})" in text
    assert "- not made: decode B48 L4096: joules per token" in text


def test_work_of_which_the_agent_tells_nothing_is_no_phase_that_was_not_measured():
    progress = [(100 + n * 0.1, n * 10) for n in range(601)]
    findings = evaluate(recording(phases=[Phase("prefill T4096", "prefill", 100.0, 160.0, 4096, progress)]))
    assert [text for text in broken(findings) if text.startswith("prefill")] == [
        "prefill T4096: tokens per second",
        "prefill T4096: joules per token",
        "prefill T4096: no false alarm about its role",
    ]


def test_an_effect_on_the_load_that_was_not_measured_is_told():
    findings = evaluate(recording(progress=[]))
    assert not_made(findings) == ["decode is not slower while the agent runs"]
    assert headline(findings).endswith("11 hold; not measured: the agent's effect on the load")


REPORTS = sorted((Path(__file__).parents[3] / "docs" / "hardware").glob("*.json"))


@pytest.mark.parametrize("figures", REPORTS, ids=lambda path: path.stem)
def test_a_committed_page_is_what_its_figures_say(figures):
    told = json.loads(figures.read_text())
    day = told.pop("date")

    def calls(name):
        return [
            CallFigures(**each | {"codes": {int(code): count for code, count in each["codes"].items()}})
            for each in told.pop(name)
        ]

    findings = Findings(
        calls=calls("calls"),
        fields=calls("fields"),
        phases=[PhaseFigures(**each) for each in told.pop("phases")],
        checks=[Check(**each) for each in told.pop("checks")],
        overhead=Overhead(**told.pop("overhead")),
        **told,
    )
    assert page_text(findings, f"{figures.stem}.png", day) == figures.with_suffix(".md").read_text()
    row = f"({figures.stem}.md) | {headline(findings).replace(' checks', '', 1)} |"
    assert row in (figures.parent / "README.md").read_text()
