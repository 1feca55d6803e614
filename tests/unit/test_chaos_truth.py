"""The oracle of the chaos tests: it must see what is wrong, or a green run says nothing."""

from dataclasses import replace

import pytest
from chaos.catalogue import CATALOGUE
from chaos.engine import EVERYTHING, draw
from chaos.truth import EITHER, RELEASED, History, Pod, Policy, World, fell, wanted_mhz, wrong, wrong_lock
from wattlock_api.schedule import Arm, Experiment, arm_of

GPU = "GPU-0"
DECODE = Pod("d", "decode-0", {"role": "decode"}, running=True, begins=False, ready=True, going=False)
PREFILL = Pod("p", "prefill-0", {"role": "prefill"}, running=True, begins=False, ready=True, going=False)
POLICY = Policy(
    uid="policy",
    name="steady",
    enforces=True,
    going=False,
    decode={"role": "decode"},
    prefill={"role": "prefill"},
    cap_mhz=1590,
    epoch_seconds=None,
    control_share=0.5,
    saved_kwh=None,
)
WORLD = World(1000.0, {GPU: 1590}, {GPU: "d"}, {"d": DECODE, "p": PREFILL}, (POLICY,))


def test_a_lock_that_is_wanted_is_right():
    assert wanted_mhz(WORLD, GPU) == 1590
    assert wrong(WORLD) == wrong(replace(WORLD, locks={}))


def test_a_wanted_lock_that_is_not_there_is_seen():
    found = wrong(replace(WORLD, locks={GPU: 0}))
    assert "wanted is 1590" in found.missing[GPU]
    assert not found.locked


def test_another_cap_than_the_policys_is_seen():
    assert "1905" in wrong(replace(WORLD, locks={GPU: 1905})).missing[GPU]


@pytest.mark.parametrize(
    "world",
    {
        "policy gone": replace(WORLD, policies=()),
        "policy going": replace(WORLD, policies=(replace(POLICY, going=True),)),
        "policy observes": replace(WORLD, policies=(replace(POLICY, enforces=False),)),
        "pool removed": replace(WORLD, policies=(replace(POLICY, decode=None),)),
        "selector changed": replace(WORLD, policies=(replace(POLICY, decode={"role": "other"}),)),
        "pod gone": replace(WORLD, pods={"p": PREFILL}),
        "pod finished": replace(WORLD, pods={"d": replace(DECODE, running=False), "p": PREFILL}),
        "held by prefill": replace(WORLD, holders={GPU: "p"}),
        "held by nobody": replace(WORLD, holders={}),
        "no prefill peer": replace(WORLD, pods={"d": DECODE}),
        "prefill peer not ready": replace(WORLD, pods={"d": DECODE, "p": replace(PREFILL, ready=False)}),
    }.items(),
    ids=lambda case: case[0].replace(" ", "-"),
)
def test_a_lock_that_no_live_order_wants_is_seen(world):
    assert wanted_mhz(world[1], GPU) == RELEASED
    assert GPU in wrong(world[1]).locked


@pytest.mark.parametrize(
    "world",
    [
        replace(WORLD, pods={"d": replace(DECODE, going=True), "p": PREFILL}),
        replace(WORLD, pods={"d": replace(DECODE, running=False, begins=True), "p": PREFILL}),
        replace(WORLD, pods={"d": DECODE, "p": replace(PREFILL, going=True)}),
        replace(WORLD, policies=(POLICY, replace(POLICY, uid="other"))),
        replace(WORLD, foreign=frozenset({GPU})),
    ],
)
def test_in_between_either_is_right(world):
    assert wanted_mhz(world, GPU) is EITHER
    for mhz in (0, 1590):
        found = wrong(replace(world, locks={GPU: mhz}))
        assert not found.locked
        assert not found.missing


def test_an_experiment_wants_what_its_arm_says_but_for_the_turn():
    policy = replace(POLICY, epoch_seconds=20)
    experiment = Experiment(policy.uid, 20, 0.5)
    seen = set()
    for epoch in range(50, 60):
        world = replace(WORLD, policies=(policy,), unix_seconds=epoch * 20.0 + 10)
        arm = arm_of(experiment, DECODE.name, epoch)
        seen.add(arm)
        assert wanted_mhz(world, GPU) == (1590 if arm is Arm.CAP else RELEASED)
        assert wanted_mhz(replace(world, unix_seconds=epoch * 20.0 + 1), GPU) is EITHER
    assert seen == set(Arm)


def test_a_lock_is_judged_by_who_held_the_gpu_then():
    history = History()
    history.see(100.0, {GPU: "d"})
    history.see(200.0, {GPU: "p"})
    history.see(300.0, {})
    decode = frozenset({"d"})
    assert wrong_lock(history, decode, GPU, 150.0) == ""
    assert wrong_lock(history, decode, GPU, 205.0) == "", "the kubelet's answer may be some seconds old"
    assert "no decode pod" in wrong_lock(history, decode, GPU, 250.0)
    assert "no pod held it" in wrong_lock(history, decode, GPU, 350.0)
    assert "no pod held it" in wrong_lock(history, decode, "GPU-1", 150.0)


def test_saved_energy_that_falls_is_seen():
    policies = [replace(POLICY, saved_kwh=1.0), replace(POLICY, uid="other", saved_kwh=None)]
    assert fell({"policy": 1.0, "other": 5.0}, policies) == []
    assert "from 1.5 to 1" in fell({"policy": 1.5}, policies)[0]


def test_a_step_is_the_same_for_the_same_seed_and_number():
    steps = [draw(7, number) for number in range(1, 200)]
    assert [step.name for step in steps] == [draw(7, number).name for number in range(1, 200)]
    assert [step.rng.random() for step in steps] == [draw(7, step.number).rng.random() for step in steps]
    assert [step.name for step in steps] != [draw(8, number).name for number in range(1, 200)]


def test_two_faults_at_once_take_hold_of_different_things():
    pairs = [step.faults for number in range(1, 2000) if len((step := draw(7, number)).faults) == 2]
    assert pairs
    for first, second in pairs:
        assert not first.touches & second.touches
        assert EVERYTHING not in first.touches | second.touches


def test_every_fault_is_drawn_and_says_what_it_does():
    drawn = {fault.name for number in range(1, 3000) for fault in draw(7, number).faults}
    assert drawn == set(CATALOGUE)
    assert all(fault.text.endswith(".") for fault in CATALOGUE.values())
