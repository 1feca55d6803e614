"""Worlds for tests of the agent's plan: any that there may be, and one of a lone GPU."""

from hypothesis import strategies as st
from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import Holders, PodName
from wattlock_agent.orders import InstanceKey, Orders
from wattlock_agent.world import AppliedLock, GpuView, Refusal, World
from wattlock_api.constants import GpuState, Mode, Reason
from wattlock_api.nodeenergy import Order

CLOCKS = tuple(range(345, 1981, 15))
PODS = tuple(PodName("llm", f"pod-{number}") for number in range(3))


def order_strategy():
    def build(pod, uid, role, mode, cap, experiment, hold, instance, generation, conflict_policy, mixed, idle):
        fields = {
            "policy": {"namespace": "llm", "name": "p", "uid": "policy", "generation": generation},
            "pool": "x",
            "role": role,
            "pod": {"namespace": pod.namespace, "name": pod.name, "uid": uid},
            "podUid": uid,
            "instance": instance,
            "mode": mode,
            "conflictPolicy": conflict_policy,
        }
        if cap is not None:
            fields["capMHz"] = cap
        if experiment:
            fields["experiment"] = {"seed": "s", "epochSeconds": 20, "controlShare": 0.5}
        if role == "Mixed" and mixed:
            fields["maxPrefillPercent"] = mixed
        if idle is not None:
            fields["idle"] = idle
        if hold:
            fields["hold"] = {"reason": "NoPrefillPeer", "message": "no prefill pod"}
        return Order.model_validate(fields)

    return st.builds(
        build,
        st.sampled_from(PODS),
        st.sampled_from(["uid-0", "uid-1", "uid-2", "uid-3"]),
        st.sampled_from(["Decode", "Decode", "Decode", "Prefill", "Mixed", "Mixed"]),
        st.sampled_from(["Enforce", "Enforce", "Enforce", "Observe"]),
        st.sampled_from([None, 100, 345, 1590, 1600, 1980, 5000]),
        st.booleans(),
        st.sampled_from([False, False, False, True]),
        st.sampled_from(["a", "b"]),
        st.integers(1, 2),
        st.sampled_from(["Skip", "Skip", "Coexist"]),
        st.sampled_from([None, 20, 20]),
        st.sampled_from([None, {"afterSeconds": 60}, {"afterSeconds": 60, "capMHz": 1000}]),
    )


#: What may hold an instance released; all but the first are about prompts, of which one without work computes none.
HOLDS = (Reason.GUARDRAIL, Reason.COMPUTES_PROMPTS, Reason.PREFILL_SHARE, Reason.PREFILL_UNKNOWN)


def refusals(reason):
    return st.sampled_from([None, None, None, None, Refusal(GpuState.RELEASED, reason, "text")])


@st.composite
def worlds(draw):
    """Any state of the world."""
    gpus = []
    for number in range(draw(st.integers(1, 4))):
        identity = GpuIdentity(
            uuid=f"GPU-{number}",
            index=number,
            minor=number,
            product="NVIDIA H200",
            supported_clocks_mhz=draw(st.sampled_from([CLOCKS, CLOCKS, CLOCKS, ()])),
            mig_enabled=draw(st.sampled_from([False, False, False, True])),
            virtual=draw(st.sampled_from([False, False, False, True])),
        )
        locks = [None, AppliedLock(1590, "uid-0"), AppliedLock(1200, "uid-1"), AppliedLock(345, "uid-0", idle=True)]
        lock = draw(st.sampled_from(locks))
        recorded = lock is not None or draw(st.booleans())
        undone = recorded and lock is None and draw(st.sampled_from([False, False, True]))
        gpus.append(
            GpuView(
                identity=identity,
                lock=lock,
                recorded=recorded,
                left_idle=recorded and lock is None and not undone and draw(st.booleans()),
                undone=undone,
                fault=draw(refusals(Reason.GPU_LOST) | refusals(Reason.NVML_ERROR)),
                refused=draw(refusals(Reason.NO_PERMISSION)),
                conflict=draw(refusals(Reason.OTHER_WRITER)),
                contested=draw(st.sampled_from(["", "", "", "another program sets its clock"])),
                foreign_mhz=draw(st.sampled_from([None, None, None, 1200])),
                suspected_until_seconds=draw(st.sampled_from([0.0, 0.0, 0.0, 105.0])),
                lock_not_before_seconds=draw(st.sampled_from([0.0, 0.0, 103.0])),
                release_not_before_seconds=draw(st.sampled_from([0.0, 0.0, 103.0])),
            )
        )
    held = {
        gpu.identity.uuid: tuple(draw(st.lists(st.sampled_from(PODS), min_size=1, max_size=2, unique=True)))
        for gpu in gpus
        if draw(st.sampled_from([True, True, True, False]))
    }
    shared = frozenset(uuid for uuid in held if draw(st.sampled_from([False, False, False, True])))
    unknown = {pod: ("MIG-x",) for pod in PODS if draw(st.sampled_from([False] * 5 + [True]))}
    unique = {order.pod_uid: order for order in draw(st.lists(order_strategy(), max_size=4))}
    known = draw(st.sampled_from([True, True, True, True, False]))
    return World(
        now_seconds=100.0,
        unix_seconds=draw(st.floats(0, 1000)),
        mode=draw(st.sampled_from([Mode.ENFORCE, Mode.ENFORCE, Mode.ENFORCE, Mode.OBSERVE])),
        may_write=draw(st.sampled_from([True, True, True, False])),
        orders=Orders(1, tuple(unique.values())) if known else None,
        stale=draw(st.sampled_from(["", "", "", "silent"])),
        holders=Holders(held, shared, unknown) if draw(st.sampled_from([True, True, True, False])) else None,
        holders_problem="",
        gpus=tuple(gpus),
        holds={
            InstanceKey("policy", name): Refusal(GpuState.RELEASED, draw(st.sampled_from(HOLDS)), "slow")
            for name in ("a", "b")
            if draw(st.sampled_from([False, False, False, True]))
        },
        idle=frozenset(InstanceKey("policy", name) for name in ("a", "b") if draw(st.booleans())),
        journal_problem=draw(st.sampled_from(["", "", "", "disk full"])),
        other_agent=draw(st.sampled_from([""] * 7 + ["another agent has the journal"])),
        pending=draw(st.booleans()),
        stopping=draw(st.sampled_from([False, False, False, True])),
    )


def lone_world(gpu, *orders):
    """A GPU that pod decode-0 holds, and nothing else that keeps it from a lock."""
    return World(
        now_seconds=100.0,
        unix_seconds=0.0,
        mode=Mode.ENFORCE,
        may_write=True,
        orders=Orders(1, orders),
        stale="",
        holders=Holders({gpu.uuid: (PodName("llm", "decode-0"),)}, frozenset(), {}),
        holders_problem="",
        gpus=(GpuView(gpu),),
        holds={},
        idle=frozenset(),
        journal_problem="",
        pending=False,
    )
