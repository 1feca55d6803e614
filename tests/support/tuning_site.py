"""A cluster for the tuner in the operator's decision: orders and reports are real, the agents are played."""

import math
import random
from dataclasses import dataclass, field, replace

from operator_worlds import (
    DECODE,
    NOW,
    PREFILL,
    agent_pod,
    as_kept,
    gpu,
    instance,
    node_energy,
    pod,
    policy,
    two_pools,
    world,
)
from tuning_world import memory_bound
from wattlock_api.base import decimal_string, timestamp
from wattlock_api.nodeenergy import AgentStatus, ClockRange, Moments, PairStats, ProductClocks
from wattlock_api.policystatus import EnergyPolicyStatus
from wattlock_api.tuningstatus import TuningStatus
from wattlock_operator.decide import Decision, Memory, decide

PODS = ("d0", "d1", "d2", "d3")
LOOK_SECONDS = 240.0


@dataclass
class Site:
    """A cluster in which time passes from look to look: the agents do at once what they are told."""

    effects: object = memory_bound
    tune: dict = field(default_factory=dict)
    rollout: dict | None = None
    mode: str = "Enforce"
    driver: str = "580.159"
    template: str = "v1"
    batch: float = 32.0
    tripped: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    """Instances whose page cannot be read."""
    now: float = NOW
    memory: Memory = field(default_factory=Memory)
    status: EnergyPolicyStatus | None = None
    asked: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(PODS))
    sums: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {name: {} for name in PODS})
    events: list[tuple[str, str]] = field(default_factory=list)
    caps: list[int | None] = field(default_factory=list)
    shares: set[float] = field(default_factory=set)
    written: tuple = ()
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    def _report(self, name: str):
        def stats(cap: int, row: list[float]) -> PairStats:
            texts = [decimal_string(value, 9) for value in row[1:]]
            moments = [Moments(total=texts[at], squares=texts[at + 1]) for at in (0, 2, 4)]
            return PairStats(
                cap_mhz=cap,
                pairs=int(row[0]),
                energy=moments[0],
                throughput=moments[1],
                latency_pairs=int(row[0]),
                latency=moments[2],
            )

        return instance(
            name,
            tokens_per_second=None if name in self.unread else decimal_string(self.batch / 0.008, 1),
            inter_token_latency_ms="8.000",
            pair_stats=[stats(cap, row) for cap, row in self.sums[name].items()][-15:],
            guardrail_tripped=name in self.tripped,
        )

    def _world(self):
        holds = {order.instance: order.hold.reason for order in self.orders() if order.hold is not None}
        gpus = [
            gpu(
                index,
                name,
                state="Released" if cap is None else "Locked",
                reason=holds.get(name, "NoOrder") if cap is None else "Locked",
                requested_mhz=cap,
                observed_mhz=cap or 1980,
            )
            for index, (name, cap) in enumerate(self.asked.items())
        ]
        found = node_energy("n1", self.orders(), gpus=gpus, instances=[self._report(name) for name in PODS])
        ranges = [ClockRange(min_mhz=345, max_mhz=1980, step_mhz=15)]
        agent = AgentStatus(driver_version=self.driver, products=[ProductClocks(product="NVIDIA H200", ranges=ranges)])
        told = found.status.model_copy(update={"agent": agent, "reported_at": timestamp(self.now - 2)})
        spec = {"mode": self.mode, "pools": two_pools({"tune": self.tune}), "rollout": self.rollout}
        pods = [pod(name, DECODE | {"pod-template-hash": self.template}) for name in PODS]
        return world(
            [policy(spec=spec, status=self.status)],
            [*pods, pod("p0", PREFILL), agent_pod("n1")],
            [replace(found, status=told)],
        )

    def orders(self):
        return self.written

    def trip_at(self, cap_mhz):
        """Search down to a cap, at which half of the instances trip; the operator restarts again and again."""
        while self.caps[-1:] != [cap_mhz]:
            self.look()
        self.tripped = PODS[:2]
        for _ in range(3):
            self.look()
            self.memory = Memory()

    def look(self, seconds: float = LOOK_SECONDS) -> Decision:
        """Let pairs come in, decide, and carry the decision out."""
        self.now += seconds
        for name, cap in self.asked.items():
            if cap is None or name in self.tripped:
                continue
            saving, loss = self.effects(cap)
            for _ in range(4):
                values = (
                    math.log1p(-saving) + self.chance.gauss(0, 0.01),
                    math.log1p(-loss) + self.chance.gauss(0, 0.015),
                    -math.log1p(-loss) + self.chance.gauss(0, 0.01),
                )
                row = self.sums[name].setdefault(cap, [0.0] * 7)
                row[0] += 1
                for at, value in enumerate(values):
                    row[1 + 2 * at] += value
                    row[2 + 2 * at] += value * value
        decision = decide(self._world(), None, self.memory, self.now)
        self.memory = decision.memory
        for node_orders in decision.write_orders.values():
            self.written = node_orders
        for order in self.orders():
            if order.role == "Decode":
                self.asked[order.instance] = order.cap_mhz
                self.shares |= {order.experiment.control_share} if order.experiment else set()
        if decision.write_statuses:
            ((_, status),) = decision.write_statuses
            self.status = as_kept(status)
        self.events += [(telling.reason, telling.message) for telling in decision.tellings]
        self.caps.append(next(iter(self.asked.values())))
        return decision

    @property
    def tuning(self) -> TuningStatus:
        return self.status.pools[0].tuning

    def search(self, restart_every: int = 0) -> TuningStatus:
        for number in range(1, 400):
            self.look()
            if self.tuning is not None and self.tuning.phase in ("Settled", "Released"):
                return self.tuning
            if restart_every and number % restart_every == 0:
                self.memory = Memory()
        raise AssertionError(f"no end: {self.tuning}")
