"""What kubectl answers to bad policies, word for word, from a real API server."""

import copy
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster]

DECODE = ("spec", "pools", 0)
MIXED = {"name": "mixed", "role": "Mixed", "selector": {"matchLabels": {"a": "b"}}}
CLOCK = {"clock": {"maxSMClockMHz": 1590}}
TOO_MANY_POOLS = [{"name": f"p{i}", "role": "Prefill", "selector": {"matchLabels": {"a": "b"}}} for i in range(17)]
CLOCK_CHOICE = (
    "write exactly one of maxSMClockMHz (a number, e.g. 1590), profile (the name of a ClockProfile, e.g. published) or "
    "tune (an object, e.g. {}: the clock is found by experiment)"
)

#: case: (path of the change, new value or DELETE, sentence in kubectl's answer)
DELETE = object()
CASES: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "misspelt field": (("spec", "mood"), "Enforce", 'unknown field "spec.mood"'),
    "misspelt field in a pool": ((*DECODE, "clocks"), {}, 'unknown field "spec.pools[0].clocks"'),
    "no spec": (("spec",), DELETE, "spec: Required value"),
    "no pools": (("spec", "pools"), DELETE, "spec.pools: Required value"),
    "empty pools": (("spec", "pools"), [], "spec.pools in body should have at least 1 items"),
    "too many pools": (("spec", "pools"), TOO_MANY_POOLS, "spec.pools: Too many: 17: must have at most 16 items"),
    "mode in lower case": (("spec", "mode"), "enforce", 'spec.mode: Unsupported value: "enforce": supported values: "Observe", "Enforce"'),
    "unknown conflict policy": (("spec", "conflictPolicy"), "Fight", 'spec.conflictPolicy: Unsupported value: "Fight": supported values: "Skip", "Coexist"'),
    "unknown role": ((*DECODE, "role"), "Decoder", 'Unsupported value: "Decoder": supported values: "Decode", "Prefill", "Mixed"'),
    "no role": ((*DECODE, "role"), DELETE, "spec.pools[0].role: Required value"),
    "no selector": ((*DECODE, "selector"), DELETE, "spec.pools[0].selector: Required value"),
    "empty selector": ((*DECODE, "selector"), {}, "an empty selector would select every pod of the namespace: write matchLabels"),
    "empty match labels": ((*DECODE, "selector"), {"matchLabels": {}}, "an empty selector would select every pod of the namespace"),
    "bad selector operator": (
        (*DECODE, "selector"),
        {"matchExpressions": [{"key": "a", "operator": "Is", "values": ["b"]}]},
        'Unsupported value: "Is": supported values: "In", "NotIn", "Exists", "DoesNotExist"',
    ),
    "two clock choices": ((*DECODE, "clock"), {"maxSMClockMHz": 1590, "profile": "published"}, CLOCK_CHOICE),
    "a clock and a tuner": ((*DECODE, "clock"), {"maxSMClockMHz": 1590, "tune": {}}, CLOCK_CHOICE),
    "a tuner with its bounds crossed": ((*DECODE, "clock"), {"tune": {"minMHz": 1500, "maxMHz": 900}}, "minMHz must not be above maxMHz"),
    "a tuner for an unknown end": ((*DECODE, "clock"), {"tune": {"objective": "Speed"}}, 'supported values: "EnergyPerToken", "EnergyDelayProduct"'),
    "a tuner on Prefill": (("spec", "pools", 1, "clock"), {"tune": {}}, "a Prefill pool may have no clock"),
    "empty clock": ((*DECODE, "clock"), {}, CLOCK_CHOICE),
    "no clock on Decode": ((*DECODE, "clock"), DELETE, "a Decode pool needs a clock: write clock: {maxSMClockMHz: 1590}, clock: {profile: published} or clock: {tune: {}}"),
    "clock on Prefill": (("spec", "pools", 1, "clock"), {"maxSMClockMHz": 1590}, "a Prefill pool may have no clock: prefill is limited by compute, so it is measured and left alone, remove clock"),
    "a tuner on Mixed": ((*DECODE,), MIXED | {"clock": {"tune": {}}}, "a Mixed pool cannot be tuned: its energy for each token moves with its prompts as much as with its clock. Write clock: {maxSMClockMHz: 1590} or clock: {profile: published}"),
    "mixed on Decode": ((*DECODE, "mixed"), {"maxPrefillPercent": 20}, "mixed says when the clock of a Mixed pool is in force: remove mixed, or write role: Mixed and a clock"),
    "mixed on Prefill": (("spec", "pools", 1, "mixed"), {}, "mixed says when the clock of a Mixed pool is in force"),
    "mixed without a clock": ((*DECODE,), MIXED | {"mixed": {}}, "mixed says when the clock of a Mixed pool is in force"),
    "no prefill allowed at all": ((*DECODE,), MIXED | CLOCK | {"mixed": {"maxPrefillPercent": 0}}, "mixed.maxPrefillPercent in body should be greater than or equal to 1"),
    "any prefill allowed": ((*DECODE,), MIXED | CLOCK | {"mixed": {"maxPrefillPercent": 100}}, "mixed.maxPrefillPercent in body should be less than or equal to 90"),
    "idle on Prefill": (("spec", "pools", 1, "idle"), {}, "idle lowers the clock of a pool that is capped: remove idle, or (not with role: Prefill) write a clock"),
    "idle on Mixed without a clock": ((*DECODE,), MIXED | {"idle": {}}, "idle lowers the clock of a pool that is capped"),
    "idle at once": ((*DECODE, "idle"), {"afterSeconds": 5}, "spec.pools[0].idle.afterSeconds in body should be greater than or equal to 10"),
    "idle after a day": ((*DECODE, "idle"), {"afterSeconds": 86400}, "spec.pools[0].idle.afterSeconds in body should be less than or equal to 3600"),
    "idle clock of nothing": ((*DECODE, "idle"), {"maxSMClockMHz": 0}, "spec.pools[0].idle.maxSMClockMHz in body should be greater than or equal to 100"),
    "negative MHz": ((*DECODE, "clock", "maxSMClockMHz"), -1590, "spec.pools[0].clock.maxSMClockMHz in body should be greater than or equal to 100"),
    "hertz instead of megahertz": ((*DECODE, "clock", "maxSMClockMHz"), 1590000000, "should be less than or equal to 5000"),
    "MHz as text": ((*DECODE, "clock", "maxSMClockMHz"), "1590MHz", 'must be of type integer: "string"'),
    "fraction of a MHz": ((*DECODE, "clock", "maxSMClockMHz"), 1590.5, "in body must be of type int64"),
    "duplicate pool names": (("spec", "pools", 1, "name"), "decode", 'spec.pools[1]: Duplicate value: {"name":"decode"}'),
    "pool name with capitals": ((*DECODE, "name"), "Decode", "spec.pools[0].name in body should match '^[a-z0-9]([a-z0-9-]*[a-z0-9])?$'"),
    "pool name too long": ((*DECODE, "name"), "d" * 33, "spec.pools[0].name: Too long: may not be more than 32"),
    "unknown architecture": ((*DECODE, "architecture"), "MHA", 'Unsupported value: "MHA": supported values: "GQA", "MLA", "GatedDeltaNet", "Mamba2", "Hybrid"'),
    "decode without prefill": (("spec", "pools", 1), DELETE, "a Decode pool needs a Prefill pool beside it: a decode label does not prove that prompts are computed elsewhere. Add a pool with role: Prefill, or set requirePrefillPeer: false"),
    "control share of one": (("spec", "verification"), {"controlShare": 1}, "spec.verification.controlShare: Invalid value: 1: must be between 0.02 and 0.5"),
    "control share of zero": (("spec", "verification"), {"controlShare": 0}, "spec.verification.controlShare: Invalid value: 0: must be between 0.02 and 0.5"),
    "epoch too short": (("spec", "verification"), {"epochSeconds": 5}, "spec.verification.epochSeconds in body should be greater than or equal to 20"),
    "unknown method": (("spec", "verification"), {"method": "Trust"}, 'Unsupported value: "Trust": supported values: "Switchback", "None"'),
    "guardrail off": (("spec", "guardrail"), {"maxThroughputLossPercent": 0}, "spec.guardrail.maxThroughputLossPercent: Invalid value: 0: must be between 0.5 and 50"),
    "negative latency": (("spec", "guardrail"), {"maxInterTokenLatencyMs": -1}, "should be greater than 0"),
    "no latency": (("spec", "guardrail"), {"maxInterTokenLatencyP99Ms": 0}, "should be greater than 0"),
    "negative queue": (("spec", "guardrail"), {"maxWaitingRequests": -1}, "should be greater than or equal to 0"),
    "no steps": (("spec", "rollout"), {"steps": []}, "spec.rollout.steps in body should have at least 1 items"),
    "step of nothing": (("spec", "rollout"), {"steps": [0, "100%"]}, 'write a number of instances (1, 2 ...) or a share of them ("25%")'),
    "step that is no number": (("spec", "rollout"), {"steps": ["some", "100%"]}, 'write a number of instances (1, 2 ...) or a share of them ("25%")'),
    "step beyond all": (("spec", "rollout"), {"steps": ["101%", "100%"]}, 'write a number of instances (1, 2 ...) or a share of them ("25%")'),
    "rollout that stops half-way": (("spec", "rollout"), {"steps": [1, "50%"]}, 'the last step must reach every instance: write "100%" at the end, e.g. [1, 25%, 100%]'),
    "no cooldown": (("spec", "guardrail"), {"cooldownSeconds": 0}, "should be greater than or equal to 10"),
    "metrics port out of range": ((*DECODE, "metrics"), {"port": 70000}, "should be less than or equal to 65535"),
    "metrics path to elsewhere": ((*DECODE, "metrics"), {"path": "@elsewhere/metrics"}, "spec.pools[0].metrics.path in body should match"),
    "metrics host": ((*DECODE, "metrics"), {"host": "10.0.0.1"}, 'unknown field "spec.pools[0].metrics.host"'),
    "price with a currency": (("spec", "cost"), {"pricePerKWh": "0.25 EUR"}, "spec.cost.pricePerKWh in body should match"),
    "price as a number": (("spec", "cost"), {"pricePerKWh": 0.25}, 'must be of type string: "number"'),
    "pue below one": (("spec", "cost"), {"pue": "0.8"}, "spec.cost.pue in body should match"),
    "too many group keys": (("spec", "groupBy"), ["a", "b", "c", "d", "e"], "spec.groupBy: Too many: 5: must have at most 4 items"),
    "node label without a name": (("spec", "placement"), {"nodeSelector": {"example.com/": "a"}}, 'write labels as nodes have them, e.g. nvidia.com/gpu.present: "true"'),
    "node label with a space": (("spec", "placement"), {"nodeSelector": {"a": "b c"}}, "write labels as nodes have them"),
    "toleration of no key": (("spec", "placement"), {"tolerations": [{"value": "a"}]}, "write the key of a taint, e.g. nvidia.com/gpu; without one the operator must be Exists"),
    "toleration that exists with a value": (("spec", "placement"), {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}, "operator Exists compares no value: remove value, or write operator: Equal"),
    "toleration with a bad key": (("spec", "placement"), {"tolerations": [{"key": "a b", "operator": "Exists"}]}, "key must be the key of a taint, e.g. nvidia.com/gpu"),
    "toleration with a bad value": (("spec", "placement"), {"tolerations": [{"key": "a", "value": "b c"}]}, "value must be the value of a taint"),
    "toleration for a while": (("spec", "placement"), {"tolerations": [{"key": "a", "operator": "Exists", "tolerationSeconds": 1}]}, 'unknown field "spec.placement.tolerations[0].tolerationSeconds"'),
    "runtime class with capitals": (("spec", "placement"), {"runtimeClassName": "NVIDIA"}, "write the name of a RuntimeClass, as kubectl get runtimeclasses shows it, e.g. nvidia"),
    "toleration in lower case": (("spec", "placement"), {"tolerations": [{"key": "x", "operator": "exists"}]}, 'Unsupported value: "exists": supported values: "Exists", "Equal"'),
}  # fmt: skip


def changed(policy: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """Return a copy of the policy with the value at ``path`` replaced or deleted."""
    result = copy.deepcopy(policy)
    place: Any = result
    for step in path[:-1]:
        place = place.setdefault(step, {}) if isinstance(place, dict) else place[step]
    if value is DELETE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_a_bad_policy_is_refused_with_a_sentence_that_helps(kubectl, crds, good_policy, case):
    path, value, sentence = CASES[case]
    answer = kubectl.apply(changed(good_policy, path, value), check=False)
    assert answer.returncode != 0, answer.stdout
    assert sentence in answer.stderr, answer.stderr


@pytest.mark.parametrize("clock", [{"maxSMClockMHz": 1590}, {"profile": "published"}, None])
def test_a_mixed_pool_may_have_a_clock_and_needs_no_prefill_beside_it(kubectl, namespace, good_policy, clock):
    pool = MIXED | ({"clock": clock, "mixed": {}, "idle": {}} if clock else {})
    here = kubectl.within(namespace)
    here.apply(changed(good_policy, ("spec", "pools"), [pool]))
    (kept,) = here.get("epol", "qwen")["spec"]["pools"]
    assert kept.get("mixed") == ({"maxPrefillPercent": 20} if clock else None)
    assert kept.get("idle") == ({"afterSeconds": 60} if clock else None)


def test_a_short_policy_gets_the_documented_defaults(kubectl, namespace, good_policy):
    here = kubectl.within(namespace)
    here.apply(changed(good_policy, ("spec", "mode"), DELETE))
    spec = here.get("epol", "qwen")["spec"]
    assert spec["mode"] == "Observe"
    assert spec["requirePrefillPeer"] is True
    assert spec["conflictPolicy"] == "Skip"
    assert spec["verification"] == {"method": "Switchback", "controlShare": 0.1, "epochSeconds": 60}
    assert spec["guardrail"] == {"maxThroughputLossPercent": 2, "cooldownSeconds": 600}
    assert spec["placement"]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}


def test_a_tuner_needs_the_released_epochs(kubectl, crds, namespace, good_policy):
    tuned = changed(good_policy, (*DECODE, "clock"), {"tune": {}})
    refused = kubectl.apply(changed(tuned, ("spec", "verification"), {"method": "None"}), check=False)
    assert refused.returncode != 0
    assert "clock.tune finds the clock by the released epochs: write verification: {method: Switch" in refused.stderr
    here = kubectl.within(namespace)
    here.apply(tuned)
    tune = here.get("epol", "qwen")["spec"]["pools"][0]["clock"]["tune"]
    assert tune == {"objective": "EnergyPerToken", "minSavingPercent": 1, "reopenAfterSeconds": 600}


def test_explain_reads_like_documentation(kubectl, crds):
    clock = kubectl.run("explain", "energypolicy.spec.pools.clock").stdout
    assert "How far the SM clock of a pool is capped: write exactly one of the" in clock
    assert "maxSMClockMHz\t<integer>" in clock
    assert "Upper bound of the SM clock in MHz while the pool decodes, e.g. 1590." in clock
    conflict = " ".join(kubectl.run("explain", "energypolicy.spec.conflictPolicy").stdout.split())
    assert "ENUM: Skip Coexist" in conflict or "Skip, Coexist" in conflict
    assert "Coexist caps them all the same: a lock of the other is overwritten (not restored afterwards)" in conflict


def test_every_field_is_described(kubectl, crds):
    for kind in ("energypolicy", "nodeenergy", "clockprofile"):
        lines = kubectl.run("explain", kind, "--recursive").stdout
        assert "FIELDS:" in lines
        plain = kubectl.run("explain", f"{kind}.spec").stdout
        assert "<no description>" not in plain


def test_the_kinds_are_found_by_short_name_and_category(kubectl, namespace, good_policy):
    here = kubectl.within(namespace)
    here.apply(good_policy)
    header = here.run("get", "epol").stdout.splitlines()[0].split()
    assert header == ["NAME", "MODE", "GPUS", "CAPPED", "CLOCK", "POWER", "SAVED", "READY", "AGE"]
    assert "energypolicy.wattlock.dev/qwen" in here.run("get", "wattlock", "-o", "name").stdout
    assert here.run("get", "nen", "-o", "name").returncode == 0
    assert here.run("get", "cprof", "-o", "name").returncode == 0


def test_status_is_a_subresource(kubectl, namespace, good_policy):
    here = kubectl.within(namespace)
    here.apply(good_policy | {"status": {"observedGeneration": 7}})
    assert "status" not in here.get("epol", "qwen")
