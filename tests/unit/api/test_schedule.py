"""The schedule of arms: agreed upon without messages, random, and never overlapping."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from wattlock_api.schedule import Arm, Experiment, arm_of, epoch_at, epoch_start_seconds, pair_of

experiments = st.builds(
    Experiment,
    seed=st.text(min_size=1, max_size=40),
    epoch_seconds=st.integers(20, 3600),
    control_share=st.floats(0.02, 0.5),
)
instances = st.text(min_size=1, max_size=60)
epochs = st.integers(0, 10**9)


@given(experiments, instances, st.integers(0, 10**6))
def test_every_block_releases_exactly_one_epoch(experiment, instance, block):
    length = experiment.block_epochs
    arms = [arm_of(experiment, instance, block * length + i) for i in range(length)]
    assert arms.count(Arm.CONTROL) == 1


@given(experiments, instances, epochs)
def test_a_pair_is_two_neighbours_of_the_epochs_block_with_different_arms(experiment, instance, epoch):
    pair = pair_of(experiment, instance, epoch)
    assert abs(pair.control - pair.cap) == 1
    assert {e // experiment.block_epochs for e in (pair.control, pair.cap)} == {epoch // experiment.block_epochs}
    assert arm_of(experiment, instance, pair.control) is Arm.CONTROL
    assert arm_of(experiment, instance, pair.cap) is Arm.CAP


@given(experiments, instances, epochs)
def test_the_share_of_control_is_what_was_asked_for_to_the_nearest_whole_block(experiment, instance, epoch):
    assert experiment.block_epochs >= 2
    assert abs(experiment.block_epochs - 1 / experiment.control_share) <= 0.5 or experiment.block_epochs == 2


@given(experiments, epochs)
def test_epochs_tile_the_wall_clock(experiment, epoch):
    start = epoch_start_seconds(experiment, epoch)
    assert epoch_at(experiment, start) == epoch
    assert epoch_at(experiment, start + experiment.epoch_seconds - 0.001) == epoch


def test_order_within_pairs_and_position_in_blocks_are_balanced():
    experiment = Experiment("6f1f9a4e", 60, 0.1)
    pairs = [pair_of(experiment, "llm/decode-0", block * 10) for block in range(2000)]
    control_first = sum(pair.control < pair.cap for pair in pairs)
    assert 900 < control_first < 1100
    positions = Counter(min(pair.control, pair.cap) % 10 for pair in pairs)
    assert set(positions) == set(range(9))
    assert min(positions.values()) > 150


def test_instances_are_not_released_in_step():
    # else a whole pool would be released at once, and a pool-wide disturbance would hit all controls together
    experiment = Experiment("6f1f9a4e", 60, 0.5)
    together = sum(arm_of(experiment, "a", epoch) is arm_of(experiment, "b", epoch) for epoch in range(2000))
    assert 850 < together < 1150


def test_the_schedule_never_changes_between_versions():
    # Agents of an old and a new version run side by side during an upgrade and must agree.
    experiment = Experiment("0b5a6a0e-9d0f-4f0e-8f53-0c7f9a3f2a11", 60, 0.25)
    arms = "".join("c" if arm_of(experiment, "llm/decode-0", 29_000_000 + i) is Arm.CONTROL else "." for i in range(24))
    assert arms == ".c...c.....c..c...c...c."
