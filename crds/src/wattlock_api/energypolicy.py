"""EnergyPolicy: what people write. Its status, which they read, is in policystatus."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from wattlock_api.base import (
    LABEL_KEY,
    LABEL_VALUE,
    ApiModel,
    LabelSelector,
    Name,
    PositiveDecimalString,
    Toleration,
    cel,
)
from wattlock_api.constants import Architecture, ConflictPolicy, Mode, Role

#: What a RuntimeClass may be called.
RUNTIME_CLASS = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"


class Tune(ApiModel):
    """Finds the cap by experiment: one cap after the other against released, from high to low.

    Kept is the one with the best objective that is shown, at 95 % confidence over the whole search, to stay within
    the guardrail: maxThroughputLossPercent, and maxInterTokenLatencyIncreasePercent (3 where the guardrail has none).
    Where nothing pays, the pool is left released. Another kind of work begins the search anew.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!has(self.minMHz) || !has(self.maxMHz) || self.minMHz <= self.maxMHz",
                    "minMHz must not be above maxMHz",
                )
            ]
        }
    )

    objective: Literal["EnergyPerToken", "EnergyDelayProduct"] = "EnergyPerToken"
    """What is made as small as the guardrail allows. EnergyDelayProduct: energy for each token times inter-token
    latency, which gives up a saving that costs as much speed."""
    min_saving_percent: Annotated[float, Field(ge=0, le=50)] = 1.0
    """A cap that saves less energy for each token is not worth it, in percent."""
    min_mhz: Annotated[int, Field(ge=100, le=5000)] | None = None
    """No cap below this is tried. Absent: the lowest that the GPUs support."""
    max_mhz: Annotated[int, Field(ge=100, le=5000)] | None = None
    """No cap above this is tried. Absent: the clock that the released GPUs run at."""
    reopen_after_seconds: Annotated[int, Field(ge=60, le=86400)] = 600
    """The work (batch, latency, pods, drivers, power limit) must be another one for so long before the search begins
    anew, in seconds."""
    rest_seconds: Annotated[int, Field(ge=0, le=604800)] | None = None
    """For so long after a search no change of load begins another one, in seconds; other pods, GPUs or drivers do.
    Absent: an hour, or four times as long as the last search took, if that is longer."""


class Clock(ApiModel):
    """How far the SM clock of a pool is capped: write exactly one of the choices.

    Required for Decode pools, optional for Mixed ones, refused for Prefill. A cap is an upper bound: the GPU may
    always run slower, it is never pinned to a clock.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "[has(self.maxSMClockMHz), has(self.profile), has(self.tune)].filter(x, x).size() == 1",
                    "write exactly one of maxSMClockMHz (a number, e.g. 1590), profile (the name of a ClockProfile, "
                    "e.g. published) or tune (an object, e.g. {}: the clock is found by experiment)",
                )
            ]
        }
    )

    max_sm_clock_mhz: Annotated[int, Field(ge=100, le=5000)] | None = None
    """Upper bound of the SM clock in MHz while the pool decodes, e.g. 1590. Values between two
    clocks that the GPU supports are rounded down to the next supported one; the pool's
    requestedMHz shows the result."""
    profile: Name | None = None
    """Name of a ClockProfile: the cap is the one of its row for the pool's GPU product,
    architecture, phase and work. No row, no lock (reason NoProfileRow). "published" is installed with
    Wattlock and holds what published measurements support."""
    tune: Tune | None = None


class MetricsEndpoint(ApiModel):
    """Where the pods of a pool serve their Prometheus metrics; the address is always the pod's own.

    Pods with the host's network are asked only where the chart's metrics.hostNetworkNamespaces has their namespace.
    Without serving metrics power is measured, but neither energy for each token nor a saving.
    """

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """TCP port. Default: the pod's prometheus.io/port annotation, else a container port named
    metrics, prometheus, system or http, else the first port of the container that holds the
    GPUs, else 8000."""
    path: Annotated[str, Field(pattern=r"^/[A-Za-z0-9._~/-]*$", max_length=128)] | None = None
    """HTTP path. Default: the pod's prometheus.io/path annotation, else /metrics."""


class Mixed(ApiModel):
    """When an instance of a Mixed pool is capped: only while it computes few prompts.

    Its share of prefill work is: prompt tokens that it computed itself, of those and the generated tokens, over the
    last 30 s. Every token passes the same weights, so this is about the share of floating-point work. It is not the
    share of time: a prompt token takes a fraction of the time of a generated one.
    """

    max_prefill_percent: Annotated[int, Field(ge=1, le=90)] = 20
    """Released at the first reading with a larger share of prefill work than this, in percent; capped (again) after a
    minute without one. Released too while the engine does not tell the share."""


#: Bounds of idle.afterSeconds.
MIN_IDLE_SECONDS, MAX_IDLE_SECONDS = 10, 3600


class Idle(ApiModel):
    """A lower cap for instances without requests.

    An instance is idle when its engine has shown no running request, no waiting one and no new token in every reading
    for afterSeconds. It is released within a second of the first request, and the pool's own clock follows.
    """

    max_sm_clock_mhz: Annotated[int, Field(ge=100, le=5000)] | None = None
    """Upper bound of the SM clock in MHz while idle, never above the pool's clock. Absent: the lowest clock that the
    GPU supports."""
    after_seconds: Annotated[int, Field(ge=MIN_IDLE_SECONDS, le=MAX_IDLE_SECONDS)] = 60
    """How long an instance must have been without work, in seconds."""


class Pool(ApiModel):
    """Pods with one role in serving."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "self.role != 'Decode' || has(self.clock)",
                    "a Decode pool needs a clock: write clock: {maxSMClockMHz: 1590}, clock: {profile: published} or "
                    "clock: {tune: {}}",
                ),
                cel(
                    "self.role != 'Prefill' || !has(self.clock)",
                    "a Prefill pool may have no clock: prefill is limited by compute, so it is measured and left "
                    "alone, remove clock",
                ),
                cel(
                    "self.role != 'Mixed' || !has(self.clock) || !has(self.clock.tune)",
                    "a Mixed pool cannot be tuned: its energy for each token moves with its prompts as much as with "
                    "its clock. Write clock: {maxSMClockMHz: 1590} or clock: {profile: published}",
                ),
                cel(
                    "!has(self.mixed) || (self.role == 'Mixed' && has(self.clock))",
                    "mixed says when the clock of a Mixed pool is in force: remove mixed, or write role: Mixed and a "
                    "clock",
                ),
                cel(
                    "!has(self.idle) || has(self.clock)",
                    "idle lowers the clock of a pool that is capped: remove idle, or (not with role: Prefill) write a "
                    "clock",
                ),
            ]
        }
    )

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", min_length=1, max_length=32)]
    """Name of the pool in status, events and metrics. Unique in the policy."""
    role: Role
    """Decode: generates tokens, its GPUs are capped. Prefill: computes prompts, its GPUs are never
    capped. Mixed: does both (aggregated serving); without a clock it is measured and never capped, with one it is
    capped while its share of prefill work is small (see mixed)."""
    selector: Annotated[
        LabelSelector,
        Field(
            json_schema_extra={
                "x-kubernetes-validations": [
                    cel(
                        "(has(self.matchLabels) && size(self.matchLabels) > 0) || "
                        "(has(self.matchExpressions) && size(self.matchExpressions) > 0)",
                        "an empty selector would select every pod of the namespace: write matchLabels, "
                        "e.g. {llm-d.ai/role: decode}",
                    )
                ]
            }
        ),
    ]
    """Which pods of the policy's own namespace belong to the pool."""
    architecture: Architecture | None = None
    """Attention architecture of the served model; picks the row of a ClockProfile."""
    metrics: MetricsEndpoint = MetricsEndpoint()
    clock: Clock | None = None
    mixed: Mixed | None = None
    idle: Idle | None = None
    """Absent: nothing happens to instances without requests."""

    @property
    def may_be_capped(self) -> bool:
        """Whether GPUs of the pool may ever be capped: Decode always, Mixed with a clock, Prefill never."""
        return self.role is Role.DECODE or (self.role is Role.MIXED and self.clock is not None)

    @property
    def max_prefill_percent(self) -> int | None:
        """Share of prefill work up to which an instance is capped, in percent; None where the pool is not mixed."""
        if self.role is not Role.MIXED or self.clock is None:
            return None
        return (self.mixed or Mixed()).max_prefill_percent


class Verification(ApiModel):
    """How the saving is proved.

    Switchback: time is cut into epochs, and in a random share of them the GPUs are released. Pairs of
    neighbouring epochs with and without the cap give the saving with a 95 % confidence interval.
    """

    method: Literal["Switchback", "None"] = "Switchback"
    """Switchback measures the saving. None caps without release epochs and publishes no saving."""
    control_share: Annotated[float, Field(ge=0.02, le=0.5)] = 0.1
    """Share of the epochs in which the GPUs are released for comparison, 0.02 to 0.5. Rounded to one epoch in
    every 2, 3, ... 50: 0.1 releases one epoch in ten. More gives a faster answer, less gives more saving."""
    epoch_seconds: Annotated[int, Field(ge=20, le=3600)] = 60
    """Length of an epoch in seconds."""


#: A cool-down never gets longer than this.
MAX_COOLDOWN_SECONDS = 86_400


class Guardrail(ApiModel):
    """When serving got worse: the node's agent releases the clock by itself, without the operator.

    The bounds on latency, queue and preemptions are judged in each reading of the metrics, and two readings in a row
    must breach one. The two bounds in percent compare capped with released epochs, at 99 % confidence.
    """

    max_throughput_loss_percent: Annotated[float, Field(ge=0.5, le=50)] = 2.0
    """Release when tokens per second under the cap stay this far below the released epochs, in percent."""
    max_inter_token_latency_ms: Annotated[float, Field(gt=0, le=60000)] | None = None
    """Release when the mean inter-token latency of an instance exceeds this, in milliseconds. Absent: no bound."""
    max_inter_token_latency_p99_ms: Annotated[float, Field(gt=0, le=60000)] | None = None
    """Release when the 99th percentile of an instance's inter-token latency exceeds this, in milliseconds. As fine as
    the engine's histogram: the bound counts as the next bucket boundary at or above it (vLLM: 10, 25, 50, 75, 100,
    150 ms ...). Needs 100 tokens in a reading. Absent: no bound."""
    max_inter_token_latency_increase_percent: Annotated[float, Field(ge=0.5, le=500)] | None = None
    """Release when the mean inter-token latency under the cap stays this far above the released epochs, in percent.
    Absent: no bound."""
    max_waiting_requests: Annotated[int, Field(ge=0, le=1000000)] | None = None
    """Release when more requests than this wait for a place in an instance's batch. Absent: no bound."""
    max_preemptions_per_minute: Annotated[float, Field(ge=0, le=1000000)] | None = None
    """Release when an instance preempts more requests a minute than this: it has run out of KV cache. Absent: no
    bound."""
    cooldown_seconds: Annotated[int, Field(ge=10, le=MAX_COOLDOWN_SECONDS)] = 600
    """How long the GPUs stay released after a breach, in seconds. Doubled, up to a day, each time that the bounds are
    breached again within the last cool-down's length after its end."""


_SHARE = r"^([1-9][0-9]?|100)%$"
#: A number of instances, or a share of them.
_STEP = {
    "x-kubernetes-int-or-string": True,
    "x-kubernetes-validations": [
        cel(
            f"type(self) == int ? self >= 1 : self.matches('{_SHARE}')",
            'write a number of instances (1, 2 ...) or a share of them ("25%")',
        )
    ],
}


_Step = Annotated[Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=_SHARE)], Field(json_schema_extra=_STEP)]


class Rollout(ApiModel):
    """How a change of clock reaches the instances of a pool: in steps, each held until it has proved harmless.

    Absent: a change of clock reaches all instances at once. The first cap of a pool is a change, too, and so is a
    changed row of a ClockProfile. When the guardrail trips on an instance under the new clock, every instance gets the
    clock of before, until the policy is changed again.
    """

    steps: Annotated[
        list[_Step],
        Field(
            min_length=1,
            max_length=5,
            json_schema_extra={
                "x-kubernetes-validations": [
                    cel(
                        "type(self[size(self) - 1]) == string && self[size(self) - 1] == '100%'",
                        'the last step must reach every instance: write "100%" at the end, e.g. [1, 25%, 100%]',
                    )
                ]
            },
        ),
    ] = [1, "25%", "100%"]
    """Instances under the new clock in each step: a number, or a share, rounded up. All GPUs of an instance change
    together."""
    hold_seconds: Annotated[int, Field(ge=10, le=86400)] = 600
    """How long a step must hold, with all its instances under the new clock and no breach, before the next one, in
    seconds. The last step, too: until it has held, a breach still takes everything back."""
    max_unavailable: Annotated[int, Field(ge=0, le=10000)] = 0
    """Instances of the pool that may be not ready while a step holds: with more of them its time begins anew."""
    paused: bool = False
    """Stay at the present step. What has the new clock keeps it."""


class Placement(ApiModel):
    """Where Wattlock's node agents run.

    Policies whose placements could select the same node, by its labels, share their agents: these run wherever one of
    the policies asks for them, and may write where one of them enforces. The administrator may limit what can be
    written here (agent.allowedPlacements of the Helm chart).
    """

    node_selector: Annotated[
        dict[str, Annotated[str, Field(max_length=63)]],
        Field(
            max_length=16,
            json_schema_extra={
                "x-kubernetes-validations": [
                    cel(
                        f"self.all(key, key.matches('{LABEL_KEY}') && "
                        f"(self[key] == '' || self[key].matches('{LABEL_VALUE}')))",
                        'write labels as nodes have them, e.g. nvidia.com/gpu.present: "true"',
                    )
                ]
            },
        ),
    ] = {"nvidia.com/gpu.present": "true"}
    """Labels of the GPU nodes. The default is the label that NVIDIA's GPU feature discovery sets."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = [
        Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
    ]
    """Taints of the GPU nodes that agents tolerate."""
    runtime_class_name: (
        Annotated[
            str,
            Field(
                max_length=253,
                json_schema_extra={
                    "x-kubernetes-validations": [
                        cel(
                            f"self.matches('{RUNTIME_CLASS}')",
                            "write the name of a RuntimeClass, as kubectl get runtimeclasses shows it, e.g. nvidia",
                        )
                    ]
                },
            ),
        ]
        | None
    ) = None
    """RuntimeClass that brings NVIDIA's driver library into the agent's container, usually nvidia.
    Absent: the nodes' default runtime. Of policies that share agents one decides: one that enforces
    before the others, then one with the default placement, then the oldest; the others are told
    (condition Conflict, reason PlacementOverlap)."""


class Cost(ApiModel):
    """Turns the saved energy into money and carbon. Wattlock measures the GPU boards alone."""

    price_per_kwh: PositiveDecimalString | None = None
    """Price of a kilowatt-hour in your currency, e.g. "0.25"."""
    grams_co2_per_kwh: Annotated[int, Field(ge=0, le=5000)] | None = None
    """Carbon intensity of your electricity in grams of CO2 per kilowatt-hour."""
    pue: Annotated[str, Field(pattern=r"^[1-9](\.[0-9]{1,4})?$", max_length=8)] | None = None
    """Power usage effectiveness of the data centre, e.g. "1.3". Applied to cost and carbon only where given."""


class EnergyPolicySpec(ApiModel):
    """What you want: which pods decode, how far their clock is capped, how it is verified and guarded."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!self.requirePrefillPeer || "
                    "!self.pools.exists(p, p.role == 'Decode') || self.pools.exists(p, p.role == 'Prefill')",
                    "a Decode pool needs a Prefill pool beside it: a decode label does not prove that prompts are "
                    "computed elsewhere. Add a pool with role: Prefill, or set requirePrefillPeer: false",
                ),
                cel(
                    "self.verification.method != 'None' || !self.pools.exists(p, has(p.clock) && has(p.clock.tune))",
                    "clock.tune finds the clock by the released epochs: write verification: {method: Switchback}",
                ),
            ]
        }
    )

    mode: Mode = Mode.OBSERVE
    """Observe (the default) measures and writes nothing to any GPU. Enforce caps the GPUs of Decode pools, and of Mixed
    pools with a clock."""
    pools: Annotated[
        list[Pool],
        Field(
            min_length=1,
            max_length=16,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ]
    """The pools of the policy: at most 16."""
    require_prefill_peer: bool = True
    """Cap pods of Decode pools only while a ready prefill pod of the same group exists. Some serving stacks label
    pods decode that do all the work; capping those would slow prefill."""
    group_by: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=316)]],
        Field(max_length=4, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = []
    """Label keys that tie decode pods to their prefill peer, e.g. [llm-d.ai/model]. Empty: all pods of the
    policy are one group."""
    conflict_policy: ConflictPolicy = ConflictPolicy.SKIP
    """What to do with GPUs whose clock or power another program sets as well: a controller that an annotation
    of the pod names (e.g. dynamo.nvidia.com/gpu-power-limit), DCGM, a person with nvidia-smi. Skip (the
    default) leaves such GPUs alone, and condition Conflict says who is suspected. Coexist caps them all the
    same: a lock of the other is overwritten (not restored afterwards), a cap that the other keeps undoing is
    set again at most once a minute, and epochs in which it was undone do not count."""
    verification: Verification = Verification()
    guardrail: Guardrail = Guardrail()
    rollout: Rollout | None = None
    placement: Placement = Placement()
    cost: Cost = Cost()

    @property
    def capped_pools(self) -> frozenset[str]:
        """Names of the pools whose GPUs may be capped."""
        return frozenset(pool.name for pool in self.pools if pool.may_be_capped)
