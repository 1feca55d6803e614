"""The tuner at work on a simulated pool: its own decisions, on the agent's own pairs, guardrail and schedule."""

from dataclasses import dataclass, replace

import numpy as np
from decision_world import (
    BOARDS,
    EPOCH_SECONDS,
    INSTANCES,
    MAX_LATENCY_PERCENT,
    MAX_LOSS_PERCENT,
    PARTS,
    SENSOR,
    Cell,
    Effect,
    Levers,
    Load,
)
from wattlock_agent.clock import Clock
from wattlock_agent.epochs import END_MARGIN_SECONDS, SCRAPE_SECONDS, SETTLE_SECONDS, Sample
from wattlock_agent.experiment import Switchback
from wattlock_agent.guardrail import GuardrailState, is_tripped, judge_pair
from wattlock_api.energypolicy import Guardrail
from wattlock_api.schedule import Arm, Experiment, arm_of
from wattlock_operator.ledger import Tally, tallies_of
from wattlock_operator.tuning.model import Goal, Observation, Phase, Regime, Tuning
from wattlock_operator.tuning.step import step
from wattlock_simulator.physics import supported_clocks_mhz

CONTROL_SHARE = 0.5
BEGIN_EPOCH = 1_800_000_000 // EPOCH_SECONDS
#: A search that is not over after so long is given up, and told.
MOST_HOURS = 48.0
GUARDRAIL = Guardrail(
    max_throughput_loss_percent=MAX_LOSS_PERCENT, max_inter_token_latency_increase_percent=MAX_LATENCY_PERCENT
)
GOAL = Goal(max_throughput_loss_percent=MAX_LOSS_PERCENT, max_latency_increase_percent=MAX_LATENCY_PERCENT)
_FIRST, _LAST = SETTLE_SECONDS, EPOCH_SECONDS - END_MARGIN_SECONDS
_OFFSETS_SECONDS = np.array([_FIRST, *np.arange(_FIRST + SCRAPE_SECONDS, _LAST - 1, SCRAPE_SECONDS), _LAST])
_WINDOW_SECONDS = _LAST - _FIRST
#: How much of each part has passed at each scrape: counters rise in straight lines within a part.
_DONE_SECONDS = (
    np.clip((_OFFSETS_SECONDS[:, None] - _FIRST) / _WINDOW_SECONDS * PARTS - np.arange(PARTS), 0, 1)
    * _WINDOW_SECONDS
    / PARTS
)


@dataclass(frozen=True)
class Tuned:
    """What the tuner came to."""

    cap_mhz: int | None
    """``None``: left released."""
    hours: float
    converged: bool
    arms: int
    breach_epochs: int
    """Epochs of an instance under a cap that is truly beyond the guardrail."""
    breach_loss: float
    """What those epochs truly lost of their throughput, summed, in percent."""
    capped_epochs: int
    trips: int
    """Releases by the guardrail of the agents."""
    final: Tuning


class _Instance:
    """A serving instance with its agent's book-keeping."""

    def __init__(self, name: str, board: float) -> None:
        self.name, self.board = name, board
        self.switchback, self.guardrail = Switchback(), GuardrailState()
        self._cap_mhz: int | None = None
        self.joules, self.tokens, self.latency_sum = 1e6, 1e6, 1e6

    def follow(self, experiment: Experiment, cap_mhz: int | None) -> None:
        """Take an order as the agent does: another cap is judged by pairs of its own."""
        if cap_mhz not in (None, self._cap_mhz):
            self.guardrail = GuardrailState(trips=self.guardrail.trips)
        self._cap_mhz = cap_mhz
        self.switchback.configure(None if cap_mhz is None else experiment, self.name, cap_mhz)

    def run(self, epoch: int, log_batch: np.ndarray, watts: np.ndarray, seconds: np.ndarray, error: float) -> None:
        """Feed the scrapes of an epoch."""
        batch = np.exp(log_batch)
        joules = _DONE_SECONDS @ (watts * (1 + error))
        tokens, latency = _DONE_SECONDS @ (batch / seconds), _DONE_SECONDS @ batch
        start = float(epoch * EPOCH_SECONDS)
        for index, offset in enumerate(_OFFSETS_SECONDS):
            self.switchback.add(
                Sample(
                    unix_seconds=start + float(offset),
                    generated_tokens=self.tokens + float(tokens[index]),
                    latency_sum_seconds=self.latency_sum + float(latency[index]),
                    latency_count=self.tokens + float(tokens[index]),
                    joules=self.joules + float(joules[index]),
                    lives=(0,),
                )
            )
        self.joules += float(joules[-1])
        self.tokens += float(tokens[-1])
        self.latency_sum += float(latency[-1])


def _tallies(instances: list[_Instance]) -> dict[int, Tally]:
    sums: dict[int, Tally] = {}
    for instance in instances:
        for cap_mhz, tally in tallies_of(instance.switchback.pair_stats()).items():
            sums[cap_mhz] = sums.get(cap_mhz, Tally()) + tally
    return sums


def tune(cell: Cell, seed: int, goal: Goal = GOAL) -> Tuned:
    """Run the tuner until it has decided."""
    chance = np.random.default_rng(seed)
    experiment = Experiment(f"{cell.name}/{seed}", EPOCH_SECONDS, CONTROL_SHARE)
    instances = [_Instance(f"llm/decode-{index}", board) for index, board in enumerate(BOARDS)]
    boards = np.array(BOARDS)[:, None].repeat(PARTS, axis=1)
    load, state, truth = Load(cell.regime, chance), Tuning(), Levers(cell)
    effects: dict[int, Effect] = {}
    trips = breach = capped_epochs = 0
    breach_loss = 0.0
    clocks = supported_clocks_mhz(cell.product)
    epoch = BEGIN_EPOCH
    while (
        state.phase in (Phase.STARTING, Phase.SEARCHING) and (epoch - BEGIN_EPOCH) * EPOCH_SECONDS < MOST_HOURS * 3600
    ):
        log_batch, start = load.epoch(), float(epoch * EPOCH_SECONDS)
        cap_mhz = state.cap_mhz
        work = cell.physics.tables(log_batch, boards)
        free, slow = work.under(None, cell.limit_watts), work.under(cap_mhz, cell.limit_watts)
        errors = chance.standard_t(4, INSTANCES) / np.sqrt(2) * SENSOR
        for row, each in enumerate(instances):
            each.follow(experiment, cap_mhz)
            tripped = is_tripped(each.guardrail, start)
            wants_cap = cap_mhz is not None and arm_of(experiment, each.name, epoch) is Arm.CAP
            is_capped = wants_cap and not tripped
            each.switchback.note(Clock(start, start), True)
            # Pairs are complete some seconds into the epoch after them.
            pairs = each.switchback.note(Clock(start + 5, start + 5), not tripped)
            watts, seconds, _ = slow if is_capped else free
            each.run(epoch, log_batch[row], watts[row], seconds[row], float(errors[row]))
            each.switchback.note(Clock(start + EPOCH_SECONDS - 0.1, start + EPOCH_SECONDS - 0.1), not tripped)
            for pair in pairs:
                before = each.guardrail.trips
                each.guardrail = judge_pair(each.guardrail, GUARDRAIL, start + EPOCH_SECONDS, pair)
                trips += each.guardrail.trips - before
            if is_capped and cap_mhz is not None:
                capped_epochs += 1
                if cap_mhz not in effects:
                    effects[cap_mhz] = truth.effect(cap_mhz)
                if not effects[cap_mhz].within:
                    breach += 1
                    breach_loss -= effects[cap_mhz].throughput
        epoch += 1
        now = float(epoch * EPOCH_SECONDS)
        batch = float(np.exp(log_batch).mean())
        rate = float((np.exp(log_batch) / free[1]).mean())
        state = step(
            state,
            goal,
            Observation(
                now_seconds=now,
                instances=INSTANCES,
                tallies=_tallies(instances),
                tripped=sum(is_tripped(each.guardrail, now) for each in instances),
                regime=Regime(batch, batch / rate, kind=cell.product.value),
                released_mhz=int(np.median(free[2])) if cap_mhz is None else None,
                supported_mhz=clocks,
                pair_seconds=2 * EPOCH_SECONDS,
            ),
        )
    return Tuned(
        cap_mhz=state.cap_mhz if state.phase is Phase.SETTLED else None,
        hours=(epoch - BEGIN_EPOCH) * EPOCH_SECONDS / 3600,
        converged=state.phase in (Phase.SETTLED, Phase.RELEASED),
        arms=len(state.trials),
        breach_epochs=breach,
        breach_loss=breach_loss,
        capped_epochs=capped_epochs,
        trips=trips,
        final=replace(state, regime=None),
    )


def effect_of(tuned: Tuned, levers: Levers) -> Effect:
    """Return what the chosen cap truly does."""
    return Effect(0.0, 0.0, 0.0, 0.0) if tuned.cap_mhz is None else levers.effect(tuned.cap_mhz)
