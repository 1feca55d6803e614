"""The whole chain from the simulated GPU to the estimate, faster than real time: is anything biased?

The GPU of the simulator (100 ms refreshes, noise of the sensor), its serving engine (the batch moves every second), and
the agent's own energy meter, scrape times and Switchback, joined in one loop instead of two nodes.
"""

import random

from estimator_world import BEGIN_UNIX_SECONDS, CAP_MHZ, CONTEXT_TOKENS
from wattlock_agent.clock import Clock
from wattlock_agent.energy import EnergyMeter
from wattlock_agent.epochs import SCRAPE_SECONDS, SETTLE_SECONDS, Sample
from wattlock_agent.experiment import Switchback
from wattlock_api.schedule import Arm, Experiment, arm_of, epoch_at, epoch_start_seconds
from wattlock_operator import pooling
from wattlock_simulator.dynamics import Inputs, Model, advance
from wattlock_simulator.physics import Architecture, Phase, Product, Workload, true_saving
from wattlock_simulator.serving.engine import Engine, Role, Settings

BATCH = 32.0
EPOCH_SECONDS = 20
STEPS_PER_SECOND = 10


def true_saving_percent() -> float:
    """Return what the cap truly saves for the mean batch."""
    workload = Workload(Architecture.GQA, Phase.DECODE, BATCH, CONTEXT_TOKENS)
    return true_saving(Product.H200, workload, CAP_MHZ).energy_percent


def run_chain(seed: int, pairs: int) -> pooling.Sample:
    """Return what one instance reports after so many pairs of epochs."""
    chance = random.Random(seed)
    experiment, name = Experiment(f"chain-{seed}", EPOCH_SECONDS, 0.5), "i"
    engine = Engine(
        Settings(Role.DECODE, Architecture.GQA, batch=BATCH, context=CONTEXT_TOKENS), seed=seed, now_seconds=0
    )
    switchback, meter, gpu = Switchback(), EnergyMeter(), Model()
    switchback.configure(experiment, name, CAP_MHZ)
    scrape_seconds = switchback.next_scrape_unix_seconds(BEGIN_UNIX_SECONDS)
    waiting: list[tuple[float, float]] = []
    lock_mhz, booked, agent_step = None, 0.0, chance.randrange(STEPS_PER_SECOND)
    for step in range(1, (2 * pairs * EPOCH_SECONDS + 10) * STEPS_PER_SECOND):
        now = BEGIN_UNIX_SECONDS + step / STEPS_PER_SECOND
        inputs = Inputs(Product.H200, engine.workload, lock_high_mhz=lock_mhz)
        gpu = advance(gpu, inputs, 1 / STEPS_PER_SECOND, chance.gauss(0, 1))
        engine.account(gpu.steps - booked, 1 / STEPS_PER_SECOND)
        booked = gpu.steps
        if step % STEPS_PER_SECOND == 0:
            engine.draw_load()
        if step % STEPS_PER_SECOND == agent_step:
            meter.add(now, int(gpu.energy_mj))
            while waiting and waiting[0][0] <= meter.newest_seconds:
                at, tokens = waiting.pop(0)
                if (point := meter.at(at)) is not None:
                    switchback.add(Sample(at, tokens, None, None, point.joules, (0,)))
            epoch = epoch_at(experiment, now)
            asked_mhz = None if arm_of(experiment, name, epoch) is Arm.CONTROL else CAP_MHZ
            settled = lock_mhz == asked_mhz or now - epoch_start_seconds(experiment, epoch) < SETTLE_SECONDS
            lock_mhz = asked_mhz
            switchback.note(Clock(now, now), settled)
        if scrape_seconds is not None and now >= scrape_seconds - 1e-6:
            waiting.append((now, float(engine.counters.generation_tokens)))
            asked = switchback.next_scrape_unix_seconds(now + 0.01)
            scrape_seconds = now + SCRAPE_SECONDS if asked is None else min(asked, now + SCRAPE_SECONDS)
    (stats,) = switchback.pair_stats()
    return pooling.Sample(stats.pairs, float(stats.energy.total), float(stats.energy.squares))
