"""A tuner's result as a ClockProfile: what is printed, what is refused with which sentence, and what is left alone."""

import io
from typing import Any

import pytest
import yaml
from operator_worlds import policy
from wattlock_api.clockprofile import PUBLISHED, ClockProfileSpec
from wattlock_api.pairs import PairStats
from wattlock_api.policystatus import EnergyPolicyStatus, PoolStatus
from wattlock_api.tuningstatus import TuningArm, TuningRegime, TuningStatus
from wattlock_operator import profile
from wattlock_operator.__main__ import main
from wattlock_operator.kube import KubeError
from wattlock_operator.rows import find_row
from wattlock_operator.tunedrow import NoRowError, profile_of, tuned_row
from wattlock_operator.tuning.model import Regime
from wattlock_operator.world import PolicyView

H200 = "NVIDIA H200"


def tuning(**changes: Any) -> TuningStatus:
    fields: dict[str, Any] = {
        "phase": "Settled",
        "message": "the tuner's own words",
        "cap_mhz": 810,
        "since": "2026-11-24T10:00:00Z",
        "tried": [
            TuningArm(cap_mhz=mhz, outcome="Open", energy_percent=saving, throughput_change_percent=f"-{loss}", **sums)
            for mhz, saving, loss, sums in (
                (1005, "20.10", "0.10", {"sums": PairStats(cap_mhz=1005, pairs=40), "seen": PairStats(cap_mhz=1005)}),
                (810, "24.36", "0.55", {"sums": PairStats(cap_mhz=810, pairs=212), "seen": PairStats(cap_mhz=810)}),
            )
        ],
        "regime": TuningRegime(
            batch="32.00", inter_token_latency_ms="8.000", products=[H200], driver_versions=["580.159.04"]
        ),
    }
    return TuningStatus(**(fields | changes))


def tuned_policy(*told: tuple[str, TuningStatus | None], mode: str = "Enforce", clock: Any = None) -> PolicyView:
    names = [name for name, _ in told] or ["decode"]
    pools = [
        {
            "name": name,
            "role": "Decode",
            "selector": {"matchLabels": {"a": name}},
            "clock": {"tune": {}} if clock is None else clock,
            "architecture": "GQA",
        }
        for name in names
    ]
    status = EnergyPolicyStatus(pools=[PoolStatus(name=name, role="Decode", tuning=found) for name, found in told])
    spec = {"mode": mode, "pools": pools, "requirePrefillPeer": False}
    return policy(spec=spec, status=status if told else None)


def test_the_row_says_what_was_found_and_under_which_work():
    row = tuned_row(tuned_policy(("decode", tuning())))
    assert row.to_api() == {
        "product": H200,
        "phase": "Decode",
        "architecture": "GQA",
        "regime": {
            "minBatch": 20.0,
            "maxBatch": 51.2,
            "minInterTokenLatencyMs": 5.93,
            "maxInterTokenLatencyMs": 10.8,
        },
        "maxSMClockMHz": 810,
        "expectedSavingPercent": "24.36",
        "expectedThroughputChangePercent": "-0.55",
        "evidence": {
            "kind": "Measured",
            "source": "clock.tune, pool decode of policy llm/qwen",
            "date": "2026-11-24T10:00:00Z",
            "driverVersion": "580.159.04",
            "samples": 212,
        },
    }
    # It is for the work that it was found under, and not for what the tuner would search anew for.
    spec = ClockProfileSpec(rows=[row])
    found = find_row(spec, H200, row.architecture, Regime(32, 0.008))
    assert found is not None
    for other in (Regime(32 * 1.62, 0.008), Regime(32 / 1.62, 0.008), Regime(32, 0.0109), Regime(32, 0.0059)):
        assert find_row(spec, H200, row.architecture, other) is None


HALF = TuningRegime(batch="32", inter_token_latency_ms="8")
MIXED = TuningRegime(batch="32", inter_token_latency_ms="8", products=[H200, "NVIDIA H100"], driver_versions=["580"])
REFUSED = {
    "still searching": (
        tuned_policy(("decode", tuning(phase="Searching"))),
        "",
        "still searches: the tuner's own",
    ),
    "about to": (tuned_policy(("decode", tuning(phase="Starting"))), "", "is about to search: the tuner's own words"),
    "nothing pays": (tuned_policy(("decode", tuning(phase="Released"))), "", "no clock pays in pool decode"),
    "observing": (tuned_policy(("decode", None), mode="Observe"), "", "set spec.mode to Enforce"),
    "not begun": (tuned_policy(("decode", None)), "", "has not begun: wait a minute"),
    "no status": (tuned_policy(), "", "has not begun"),
    "no tuner": (tuned_policy(("decode", None), clock={"maxSMClockMHz": 900}), "", "write clock: {tune: {}}"),
    "no such pool": (
        tuned_policy(("decode", tuning())),
        "code",
        "no pool code with clock.tune (there are: decode)",
    ),
    "which pool": (tuned_policy(("one", tuning()), ("two", tuning())), "", "choose one by --pool (one, two)"),
    "products": (tuned_policy(("decode", tuning(regime=MIXED))), "", "of several products (NVIDIA H200, NVIDIA H100)"),
    "an older status": (tuned_policy(("decode", tuning(regime=HALF))), "", "does not tell product and driver"),
    "no arm": (tuned_policy(("decode", tuning(tried=[]))), "", "does not say how its clock was found"),
    "no time": (tuned_policy(("decode", tuning(since=None))), "", "does not say how its clock was found"),
}


@pytest.mark.parametrize(("found", "pool", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_found_is_not_written(found, pool, sentence):
    with pytest.raises(NoRowError) as refusal:
        tuned_row(found, pool)
    assert sentence in str(refusal.value)


def test_of_several_pools_one_is_chosen():
    found = tuned_policy(("one", tuning()), ("two", tuning(cap_mhz=1005)))
    assert tuned_row(found, "two").max_sm_clock_mhz == 1005


ROW = tuned_row(tuned_policy(("decode", tuning())))


def old_row(**changes: Any) -> dict[str, Any]:
    return ROW.to_api() | {"maxSMClockMHz": 700} | changes


def into(*rows: dict[str, Any]) -> tuple[list[int], tuple[int, ...]]:
    text, replaced = profile_of("mine", ROW, {"metadata": {"name": "mine"}, "spec": {"rows": list(rows)}})
    written = yaml.safe_load(text)["spec"]["rows"]
    ClockProfileSpec.model_validate({"rows": written})
    return [row["maxSMClockMHz"] for row in written], replaced


def test_a_row_about_the_same_work_is_replaced_in_its_place():
    published = PUBLISHED.to_api()["rows"][0]
    assert into(published, old_row(), published) == ([1590, 810, 1590], (2,))
    # A search at nearly the same batch, of last week.
    assert into(old_row(regime=ROW.regime.to_api() | {"minBatch": 21.9, "maxBatch": 56.0})) == ([810], (1,))


OTHERS = {
    "another product": {"product": "NVIDIA H100"},
    "another architecture": {"architecture": "MLA"},
    "another work": {"regime": ROW.regime.to_api() | {"minBatch": 40, "maxBatch": 102}},
    "a wider regime": {"regime": {"minBatch": 1, "maxBatch": 1000}},
    "any work": {"regime": None},
    "published": {"evidence": {"kind": "Published", "source": "a paper"}},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_other_rows_are_untouched_and_the_new_one_goes_before_them(change):
    other = {key: value for key, value in old_row(**change).items() if value is not None}
    assert into(other) == ([700, 810], ())
    rows = yaml.safe_load(profile_of("mine", ROW, {"metadata": {}, "spec": {"rows": [other]}})[0])["spec"]["rows"]
    assert rows[0] == other
    found = find_row(ClockProfileSpec.model_validate({"rows": rows}), H200, ROW.architecture, Regime(32, 0.008))
    assert found is None or found.row.max_sm_clock_mhz == 810


def test_labels_stay_and_kubectls_own_annotation_does_not():
    metadata = {
        "labels": {"team": "llm"},
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "why": "because"},
        "resourceVersion": "7",
    }
    text, _ = profile_of("mine", ROW, {"metadata": metadata, "spec": {"rows": []}})
    expected = {"name": "mine", "labels": {"team": "llm"}, "annotations": {"why": "because"}}
    assert yaml.safe_load(text)["metadata"] == expected


def test_a_full_profile_is_refused():
    with pytest.raises(NoRowError, match="more than 128 are refused"):
        profile_of("mine", ROW, {"metadata": {}, "spec": {"rows": [old_row(product=f"p{at}") for at in range(128)]}})


def test_rows_of_a_later_version_are_kept():
    later = {"product": H200, "phase": "Sleep", "maxSMClockMHz": 300}
    text, replaced = profile_of("mine", ROW, {"metadata": {}, "spec": {"rows": [later]}})
    assert (yaml.safe_load(text)["spec"]["rows"][0], replaced) == (later, ())


class FakeKube:
    def __init__(self, **objects: Any) -> None:
        self.objects = objects

    def get(self, path: str) -> Any:
        if "broken" in path:
            raise KubeError(f"GET {path}: HTTP 403: forbidden", 403)
        return self.objects.get(path.rsplit("/", 1)[1])


def api_policy() -> dict[str, Any]:
    found = tuned_policy(("decode", tuning()))
    metadata = {"namespace": "llm", "name": "qwen", "uid": "u"}
    return {"metadata": metadata, "spec": found.spec.to_api(), "status": found.status.to_api()}


def ask(policy_name: str = "llm/qwen", pool: str = "", name: str = "", into: str = "") -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    existing = {"metadata": {"name": "mine"}, "spec": {"rows": [old_row()]}}
    kube: Any = FakeKube(qwen=api_policy(), mine=existing)
    code = profile.run(kube, policy_name, pool, name, into, out, err)
    assert (code == 0) == bool(out.getvalue())
    return code, out.getvalue(), err.getvalue()


def test_the_command_prints_a_profile_and_nothing_else():
    code, out, err = ask()
    assert (code, err) == (0, "")
    document = yaml.safe_load(out)
    assert (document["kind"], document["metadata"]) == ("ClockProfile", {"name": "llm-qwen"})
    assert document["spec"]["rows"] == [ROW.to_api()]
    assert yaml.safe_load(ask(name="gqa")[1])["metadata"] == {"name": "gqa"}


def test_the_command_tells_what_it_replaces():
    code, out, err = ask(into="mine")
    assert (code, err) == (0, "wattlock-operator: replaces row(s) 1 of mine\n")
    assert yaml.safe_load(out)["metadata"]["name"] == "mine"
    assert yaml.safe_load(ask(into="mine", name="other")[1])["metadata"]["name"] == "other"


@pytest.mark.parametrize(
    ("asked", "code", "sentence"),
    [
        ({"policy_name": "qwen"}, 2, "write NAMESPACE/POLICY"),
        ({"policy_name": "a/b/c"}, 2, "write NAMESPACE/POLICY"),
        ({"policy_name": "llm/gone"}, 1, "there is no policy llm/gone"),
        ({"policy_name": "llm/broken"}, 1, "forbidden"),
        ({"pool": "code"}, 1, "has no pool code"),
        ({"into": "gone"}, 1, "there is no ClockProfile gone"),
        ({"into": "published"}, 2, "give your own profile a name by --name"),
        ({"name": "Mine"}, 2, "is no name for a ClockProfile"),
    ],
)
def test_the_command_says_what_is_wrong(asked, code, sentence):
    found = ask(**asked)
    assert found[0] == code
    assert sentence in found[2]


def test_it_is_dispatched_without_any_setting(monkeypatch, capsys):
    monkeypatch.delenv("WATTLOCK_NAMESPACE", raising=False)
    monkeypatch.setattr("wattlock_operator.__main__.connect", lambda: FakeKube(qwen=api_policy()))
    assert main(["profile", "llm/qwen", "--pool", "decode"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["spec"]["rows"][0]["maxSMClockMHz"] == 810
