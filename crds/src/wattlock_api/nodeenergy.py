"""NodeEnergy: what the operator asks of a node's agent, and what the agent measured.

One object per node, written by machines. ``spec`` belongs to the operator alone, ``status`` to the node's
agent alone, so the two never write the same field.
"""

from typing import Annotated, Literal

from pydantic import Field

from wattlock_api.base import (
    ApiModel,
    ObjectRef,
    PositiveDecimalString,
    ReasonName,
    Sentence,
    Timestamp,
    Uid,
)
from wattlock_api.constants import ConflictPolicy, GpuState, Mode, Role
from wattlock_api.energypolicy import MAX_IDLE_SECONDS, MIN_IDLE_SECONDS, Guardrail
from wattlock_api.pairs import Moments as Moments
from wattlock_api.pairs import PairStats as PairStats
from wattlock_api.policystatus import Limiters
from wattlock_api.schedule import Experiment

#: The scheme and a literal address: an agent never resolves a name.
_METRICS_URL = r"^http://[0-9a-fA-F.:\[\]]+/[A-Za-z0-9._~/-]*$"
InstanceName = Annotated[str, Field(min_length=1, max_length=512)]
NodeName = Annotated[str, Field(min_length=1, max_length=253)]
PoolName = Annotated[str, Field(min_length=1, max_length=32)]


def _map_list(*keys: str) -> dict[str, object]:
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


class PolicyRef(ObjectRef):
    """The policy behind an order."""

    generation: int = 0
    """Generation of the policy's spec that the order follows."""


class Hold(ApiModel):
    """Why the operator does not want a pod capped now."""

    reason: ReasonName
    """One word for programs."""
    message: Sentence
    """A sentence for people."""


class OrderExperiment(ApiModel):
    """Schedule of capped and released epochs; see wattlock_api.schedule."""

    seed: Annotated[str, Field(min_length=1, max_length=64)]
    """Seed of the random schedule: the UID of the policy."""
    epoch_seconds: Annotated[int, Field(ge=20, le=3600)]
    """Length of an epoch in seconds."""
    control_share: Annotated[float, Field(ge=0.02, le=0.5)]
    """Share of released epochs."""

    def experiment(self) -> Experiment:
        """Return the schedule that these numbers describe."""
        return Experiment(self.seed, self.epoch_seconds, self.control_share)


class InstanceSpan(ApiModel):
    """The whole of an instance that has pods on several nodes, or pods that Wattlock does not see.

    Energy for each token needs the energy of all its GPUs: from one node alone it would look too low.
    """

    nodes: Annotated[list[NodeName], Field(min_length=1, max_length=64)]
    """Every node with a GPU pod of the instance, sorted; this one too."""
    missing_pods: Annotated[int, Field(ge=0)] = 0
    """Pods that the instance should have and that the policy does not select, or that do not run."""


class OrderIdle(ApiModel):
    """A lower cap while the instance has no requests."""

    cap_mhz: Annotated[int, Field(ge=100, le=5000)] | None = None
    """Upper bound of the SM clock while idle, in MHz. Absent: the lowest clock that the GPU supports."""
    after_seconds: Annotated[int, Field(ge=MIN_IDLE_SECONDS, le=MAX_IDLE_SECONDS)]
    """How long it must have been without work, in seconds."""


class Order(ApiModel):
    """What is wanted of the GPUs of one pod."""

    policy: PolicyRef
    """The policy."""
    pool: PoolName
    """Its pool."""
    role: Role
    """The pool's role."""
    pod: ObjectRef
    """The pod, by UID: a later pod of the same name is another one."""
    pod_uid: Uid
    """UID of the pod once more: the key of the list."""
    instance: InstanceName
    """The serving instance that the pod belongs to. All its GPUs have the same arm in an epoch."""
    mode: Mode
    """Observe: write nothing."""
    cap_mhz: Annotated[int, Field(ge=100, le=5000)] | None = None
    """Upper bound of the SM clock in MHz. Absent: the GPUs are to be released."""
    hold: Hold | None = None
    """Why capMHz is absent although the pool has a clock."""
    experiment: OrderExperiment | None = None
    """Absent: capped in every epoch."""
    guardrail: Guardrail | None = None
    """When the agent releases by itself."""
    metrics_url: Annotated[str, Field(pattern=_METRICS_URL, max_length=256)] | None = None
    """Where the pod serves its metrics: its own address, never one that a user typed. Absent until it has one."""
    span: InstanceSpan | None = None
    """Absent: all of the instance is on this node."""
    conflict_policy: ConflictPolicy = ConflictPolicy.SKIP
    """Skip: leave a GPU alone whose clock another program sets. Coexist: cap it all the same."""
    max_prefill_percent: Annotated[int, Field(ge=1, le=90)] | None = None
    """Mixed pools with a clock: capped only while at most this share of the instance's tokens are prompt tokens that it
    computed, in percent. Without it a Mixed pod is never capped."""
    idle: OrderIdle | None = None
    """Absent: nothing happens while the instance has no requests. Given together with capMHz alone."""

    @property
    def may_be_capped(self) -> bool:
        """Whether the role allows a cap at all: Decode always, Mixed with its bound, Prefill never."""
        return self.role is Role.DECODE or (self.role is Role.MIXED and self.max_prefill_percent is not None)


class NodeEnergySpec(ApiModel):
    """Orders for the node's agent, written by the operator."""

    orders: Annotated[list[Order], Field(max_length=256, json_schema_extra=_map_list("podUid"))] = []
    """One for each selected pod on the node. A GPU whose pod has no order is released."""


class ClockRange(ApiModel):
    """Clocks from min to max in equal steps."""

    min_mhz: int
    """Lowest, in MHz."""
    max_mhz: int
    """Highest, in MHz."""
    step_mhz: Annotated[int, Field(ge=1)]
    """Step, in MHz."""


class ProductClocks(ApiModel):
    """SM clocks that a GPU product of the node supports, read from the driver."""

    product: Annotated[str, Field(max_length=128)]
    """Product as NVML names it."""
    ranges: Annotated[list[ClockRange], Field(max_length=64)]
    """The supported clocks."""


class AgentStatus(ApiModel):
    """The agent and what it can do on this node."""

    version: Annotated[str, Field(max_length=64)] = ""
    """Version of the agent."""
    pod: Annotated[str, Field(max_length=253)] = ""
    """Name of its pod."""
    driver_version: Annotated[str, Field(max_length=64)] = ""
    """NVIDIA driver version; empty while NVML does not answer."""
    can_write: bool = False
    """Whether the agent may lock clocks (it has the SYS_ADMIN capability, or a write has succeeded)."""
    reason: ReasonName = ""
    """Why it cannot work as asked, one word; empty when it can."""
    message: Sentence = ""
    """The same as a sentence with the remedy."""
    products: Annotated[list[ProductClocks], Field(max_length=8)] = []
    """Supported SM clocks by GPU product."""


class GpuStatus(ApiModel):
    """One GPU as its agent sees it. Counters run since the agent began to track the GPU for its holder."""

    uuid: Annotated[str, Field(max_length=96)]
    """UUID of the GPU."""
    index: int
    """Index in NVML's order."""
    product: Annotated[str, Field(max_length=128)] = ""
    """Product as NVML names it."""
    state: GpuState
    """Released, Locked, Observing, Conflict, Unsupported or Lost."""
    reason: ReasonName
    """Why, in one word."""
    message: Sentence = ""
    """Why, in a sentence."""
    holder: ObjectRef | None = None
    """The pod with an order that holds the GPU."""
    policy_uid: Uid | None = None
    """The policy that the holder's order follows."""
    pool: PoolName | None = None
    """Its pool."""
    instance: InstanceName | None = None
    """The serving instance."""
    requested_mhz: int | None = None
    """The cap that our lock asks for, in MHz, also while a control epoch releases it for comparison or another program
    has undone it (reason Contested). While the instance is idle (reason Idle) the cap that it gets back with its first
    request."""
    observed_mhz: int | None = None
    """Median SM clock in MHz of the readings (one a second) in which the GPU was busy, over 20 s. Where a clock is
    requested: of the last 20 s under that cap, so that it stands through control epochs. Else: of the last 20 s."""
    power_watts: int | None = None
    """Mean power over the last 20 s, in watts: the rise of the energy counter by the time. Absent until the counter was
    read for 5 s."""
    peak_watts: int | None = None
    """Highest instantaneous power among the readings (one a second) of the last 20 s, in watts."""
    power_limit_watts: int | None = None
    """Enforced power limit, in watts."""
    energy_joules: PositiveDecimalString | None = None
    """Energy since tracking began, in joules, from the driver's energy counter alone. An interval of which the counter
    does not tell is left out and counted in energyGaps. Absent where the GPU has no counter, see energyReason."""
    energy_reason: ReasonName = ""
    """Why there is no energy and no power, one word; empty when there is."""
    energy_gaps: int = 0
    """Intervals that are not in energyJoules: the agent, the driver or the GPU restarted, or the counter jumped by more
    than the board can use."""
    busy_seconds: PositiveDecimalString | None = None
    """Time with work, in seconds: utilisation, read once a second, times the time since the reading before. Gaps of
    more than two readings do not count."""
    recent_busy_seconds: PositiveDecimalString | None = None
    """The last 15 minutes of busy time, or what there is of them, in seconds: the power cap is judged by them."""
    recent_power_cap_seconds: PositiveDecimalString | None = None
    """Time at the power cap in them, from the driver's nanosecond counter, in seconds. Absent where the GPU has no such
    counter."""
    clamped: bool = False
    """Whether the clock stays below the cap although no limiter acts: in at least five readings of the last 10 s the
    GPU was busy for 90 % or more, their median clock is more than one supported step below the cap, and no limiter's
    counter grew. The finding stands through control epochs and lulls, until the GPU is loaded under the cap again."""
    clamp_seconds: PositiveDecimalString | None = None
    """Time under load for which that was so, in seconds; the readings that it takes to find out do not count."""
    limiters: Limiters = Limiters()
    """What held the clock down, in seconds, from the driver's nanosecond counters: the time between two readings is
    counted however far they are apart, but not over a restart of the driver."""


class ArmTotals(ApiModel):
    """Sums over the epochs of one arm of an instance."""

    cap_mhz: Annotated[int, Field(ge=0, le=5000)]
    """The cap, in MHz; 0 is the control arm (released)."""
    seconds: PositiveDecimalString = "0"
    """Time in this arm, in seconds."""
    joules: PositiveDecimalString = "0"
    """GPU-board energy, in joules."""
    generated_tokens: PositiveDecimalString = "0"
    """Generated tokens."""


class DroppedEpochs(ApiModel):
    """Epochs that took no part in the estimate, by cause."""

    restart: int = 0
    """The serving engine or a counter restarted."""
    no_tokens: int = 0
    """No tokens were generated."""
    samples: int = 0
    """Fewer than 80 % of the samples."""
    not_applied: int = 0
    """The GPUs were not as the schedule asked (guardrail, conflict, a late start), or serving was so bad in a released
    epoch that a capped one would have been released by the guardrail."""
    peers: int = 0
    """The instance's energy on its other nodes is not known for that epoch."""


class EpochPower(ApiModel):
    """Power of an instance's GPUs on one node in an epoch that is over."""

    epoch: Annotated[int, Field(ge=0)]
    """Number of the epoch; see wattlock_api.schedule."""
    watts: PositiveDecimalString | None = None
    """Mean power over the part of the epoch that is measured, in watts. Absent: the epoch cannot be used."""


class InstanceStatus(ApiModel):
    """A serving instance, as far as it runs on this node."""

    key: Annotated[str, Field(max_length=640)]
    """Policy UID and instance: the key of the list."""
    policy_uid: Uid
    """The policy."""
    pool: PoolName
    """The pool."""
    instance: InstanceName
    """The instance."""
    reason: ReasonName = ""
    """What is wrong with the serving metrics, or not told by them, one word; empty when nothing is."""
    message: Sentence = ""
    """The same as a sentence."""
    tokens_per_second: PositiveDecimalString | None = None
    """Generated tokens per second over the last report interval."""
    prompt_tokens_per_second: PositiveDecimalString | None = None
    """Prompt tokens computed here per second (not taken from a cache or another instance)."""
    joules_per_generated_token: PositiveDecimalString | None = None
    """GPU-board joules for each generated token over the last report interval."""
    joules_per_prompt_token: PositiveDecimalString | None = None
    """GPU-board joules for each computed prompt token over the last report interval; Prefill pools only."""
    token_energy_reason: ReasonName = ""
    """Why there are no joules for each token although tokens and energy are measured, one word: NoTokens (it was idle),
    SpansNodes (this node's GPUs are only a part; the pool's status has the whole)."""
    inter_token_latency_ms: PositiveDecimalString | None = None
    """Mean inter-token latency over the last report interval, in milliseconds."""
    waiting_requests: int | None = None
    """Requests that wait for a place in the batch."""
    kv_cache_usage_percent: PositiveDecimalString | None = None
    """Share of the KV cache in use, in percent; of several engines the fullest."""
    estimated_gigaflops: PositiveDecimalString | None = None
    """Floating-point operations of one GPU by the engine's own estimate, in 10^9 a second; summed over the engines of a
    page with several."""
    estimated_gigabytes: PositiveDecimalString | None = None
    """Bytes moved to and from the memory of one GPU by the engine's own estimate, in 10^9 a second, summed likewise."""
    computes_prompts: bool = False
    """Whether a decode instance computes prompts itself, or a mixed one more of them than its pool allows: then it is
    not capped. Told in Observe as well."""
    guardrail_tripped: bool = False
    """Whether it is held released because the guardrail was breached. Stays so until the cool-down ends, also while the
    order has no cap."""
    guardrail_message: Sentence = ""
    """What was breached, by how much, until when it stays released."""
    guardrail_withdrawn: bool = False
    """Whether the operator withdrew the cap since that breach: the cool-down goes on, but nothing was breached under
    the present order."""
    guardrail_trips: int = 0
    """Breaches so far."""
    energy_joules: PositiveDecimalString | None = "0"
    """Energy of the instance's GPUs on this node since tracking began, in joules. Absent where one of them has no
    energy counter."""
    arms: Annotated[list[ArmTotals], Field(max_length=16, json_schema_extra=_map_list("capMHz"))] = []
    """Sums by arm."""
    pair_stats: Annotated[list[PairStats], Field(max_length=16, json_schema_extra=_map_list("capMHz"))] = []
    """The experiment so far."""
    dropped: DroppedEpochs = DroppedEpochs()
    """Epochs that were not used."""
    epochs: Annotated[list[EpochPower], Field(max_length=8, json_schema_extra=_map_list("epoch"))] = []
    """The last closed epochs, where the instance has its metrics on another node: the agent there needs them."""


class NodeEnergyStatus(ApiModel):
    """What the node's agent did and measured."""

    observed_generation: int = 0
    """Generation of the spec that the agent has acted on: every order of it is in force or refused with a reason."""
    reported_at: Timestamp | None = None
    """When the agent wrote this."""
    phase: Literal["Running", "Stopping"] = "Running"
    """Stopping: the agent has released its GPUs and is going away."""
    agent: AgentStatus = AgentStatus()
    """The agent."""
    gpus: Annotated[list[GpuStatus], Field(max_length=32, json_schema_extra=_map_list("uuid"))] = []
    """The GPUs of the node."""
    instances: Annotated[list[InstanceStatus], Field(max_length=256, json_schema_extra=_map_list("key"))] = []
    """The serving instances of the node."""
    capped: Annotated[str, Field(max_length=16)] | None = None
    """GPUs under a cap of all GPUs of the node, e.g. 3/4, for kubectl get. GPUs that a control epoch releases for
    comparison count, and those under the lower cap of idle instances."""
    locked: int = 0
    """Number of GPUs under a lock of ours at this moment."""
