"""Names that more than one part of Wattlock must agree on."""

from enum import StrEnum

GROUP = "wattlock.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

#: Field managers of server-side apply: who owns which fields of a resource.
OPERATOR_FIELD_MANAGER = "wattlock-operator"
AGENT_FIELD_MANAGER = "wattlock-agent"

#: Keeps a policy until every GPU it locked is released.
FINALIZER = f"{GROUP}/release-gpus"
#: On a policy that is being deleted: do not wait any longer for nodes that cannot answer, nor for one whose agent
#: answers and still claims locks after STUCK_RELEASE_SECONDS. Value: "true".
FORCE_RELEASE_ANNOTATION = f"{GROUP}/abandon-unreachable-nodes"
#: On agent DaemonSets and their pods: hash of the placement that they serve (of several the oldest policy's).
PLACEMENT_LABEL = f"{GROUP}/placement"
#: On a NodeEnergy, written by the operator: power of the instances whose other nodes' agents reported it, as JSON (see
#: wattlock_api.peerpower). An annotation and not the spec, because it is news and no order: it must not make the
#: generation move, which says whether orders are acted on.
PEER_POWER_ANNOTATION = f"{GROUP}/peer-power"
COMPONENT_LABEL = "app.kubernetes.io/component"
AGENT_COMPONENT = "agent"

#: The lease that the operator renews in its own namespace and every agent reads.
LEASE_NAME = "wattlock-operator"
LEASE_RENEW_SECONDS = 20
#: An agent that has seen neither the API server nor a fresh lease for so long releases its GPUs, unless told otherwise.
STALE_ORDERS_SECONDS = 600
#: Told to wait less than three renewals, an agent would take an operator that is a little late for dead.
MIN_STALE_ORDERS_SECONDS = 3 * LEASE_RENEW_SECONDS
MAX_STALE_ORDERS_SECONDS = 86_400

#: A working agent needs seconds to release. One that still claims a lock so long after the deletion cannot or lies.
STUCK_RELEASE_SECONDS = 600

#: The ClockProfile that the operator ships: what published measurements support, nothing more.
PUBLISHED_PROFILE = "published"


class Mode(StrEnum):
    """Whether a policy may write to GPUs."""

    OBSERVE = "Observe"
    ENFORCE = "Enforce"


class ConflictPolicy(StrEnum):
    """What to do about GPUs whose clock or power another program sets as well."""

    SKIP = "Skip"
    COEXIST = "Coexist"


class Role(StrEnum):
    """What the pods of a pool do in disaggregated serving."""

    DECODE = "Decode"
    PREFILL = "Prefill"
    MIXED = "Mixed"


class Architecture(StrEnum):
    """Attention architecture of the served model: it decides how much clock decode needs."""

    GQA = "GQA"
    MLA = "MLA"
    GATED_DELTA_NET = "GatedDeltaNet"
    MAMBA2 = "Mamba2"
    HYBRID = "Hybrid"


class GpuState(StrEnum):
    """State of one GPU as its agent sees it."""

    RELEASED = "Released"
    LOCKED = "Locked"
    OBSERVING = "Observing"
    CONFLICT = "Conflict"
    UNSUPPORTED = "Unsupported"
    LOST = "Lost"


class Reason(StrEnum):
    """Why a GPU, an order or a pool is as it is. Each comes with a sentence in ``message``."""

    # in force
    LOCKED = "Locked"
    CONTROL_EPOCH = "ControlEpoch"
    IDLE = "Idle"
    OBSERVE_MODE = "ObserveMode"
    PREFILL_POOL = "PrefillPool"
    MIXED_POOL = "MixedPool"
    NO_ORDER = "NoOrder"
    WAITING_TO_WRITE = "WaitingToWrite"
    # decided by the operator
    NO_PREFILL_PEER = "NoPrefillPeer"
    NO_PROFILE_ROW = "NoProfileRow"
    PROFILE_NOT_FOUND = "ProfileNotFound"
    PRODUCT_UNKNOWN = "ProductUnknown"
    POLICY_CONFLICT = "PolicyConflict"
    ROLLOUT_PENDING = "RolloutPending"
    ROLLED_BACK = "RolledBack"
    OTHER_CONTROLLER = "OtherController"
    TUNING = "Tuning"
    NO_CLOCK_PAYS = "NoClockPays"
    NO_MATCHING_PODS = "NoMatchingPods"
    NO_GPUS = "NoGPUs"
    NO_AGENT = "NoAgent"
    AGENT_SILENT = "AgentSilent"
    PLACEMENT_INVALID = "PlacementInvalid"
    PLACEMENT_NOT_ALLOWED = "PlacementNotAllowed"
    TOO_MANY_PLACEMENTS = "TooManyPlacements"
    PLACEMENT_OVERLAP = "PlacementOverlap"
    # decided by the agent
    STALE_ORDERS = "StaleOrders"
    COMPUTES_PROMPTS = "ComputesPrompts"
    PREFILL_SHARE = "PrefillShare"
    PREFILL_UNKNOWN = "PrefillUnknown"
    PREFILL_NOT_TOLD = "PrefillNotTold"
    GUARDRAIL = "Guardrail"
    UNSUPPORTED_CLOCK = "UnsupportedClock"
    CLOCKS_NOT_SUPPORTED = "ClocksNotSupported"
    NO_PERMISSION = "NoPermission"
    MIG_ENABLED = "MIGEnabled"
    VIRTUAL_GPU = "VirtualGPU"
    SHARED_GPU = "SharedGPU"
    UNKNOWN_DEVICE = "UnknownDevice"
    POD_NOT_ON_NODE = "PodNotOnNode"
    HOLDER_CHANGED = "HolderChanged"
    KUBELET_UNREACHABLE = "KubeletUnreachable"
    OTHER_WRITER = "OtherWriter"
    CONTESTED = "Contested"
    FOREIGN_LOCK = "ForeignLock"
    GPU_LOST = "GPULost"
    NVML_ERROR = "NVMLError"
    NVML_NOT_FOUND = "NVMLNotFound"
    JOURNAL_UNWRITABLE = "JournalUnwritable"
    JOURNAL_DAMAGED = "JournalDamaged"
    SECOND_AGENT = "SecondAgent"
    AGENT_STOPPING = "AgentStopping"
    # about measurements
    NO_ENERGY_COUNTER = "NoEnergyCounter"
    # about serving metrics
    NO_SERVING_METRICS = "NoServingMetrics"
    HOST_NETWORK_METRICS = "HostNetworkMetrics"
    METRICS_UNREACHABLE = "MetricsUnreachable"
    METRICS_INVALID = "MetricsInvalid"
    METRICS_TOO_LARGE = "MetricsTooLarge"
    COUNTERS_RESTARTED = "CountersRestarted"
    NO_TOKENS = "NoTokens"
    IDLE_NOT_TOLD = "IdleNotTold"
    SPANS_NODES = "SpansNodes"
    # about savings
    VERIFICATION_OFF = "VerificationOff"
    NOTHING_LOCKED = "NothingLocked"
    TOO_FEW_PAIRS = "TooFewPairs"
    INTERVAL_TOO_WIDE = "IntervalTooWide"
    INTERVAL_INCLUDES_ZERO = "IntervalIncludesZero"
    NEEDS_MORE_EVIDENCE = "NeedsMoreEvidence"
    INTERVAL_EXCLUDES_ZERO = "IntervalExcludesZero"
    CAP_COSTS_ENERGY = "CapCostsEnergy"


class ConditionReason(StrEnum):
    """Why a condition is as it is, or what an Event tells, where it is no ``Reason`` that GPUs and pools have too."""

    # Ready
    IN_FORCE = "InForce"
    OBSERVING = "Observing"
    WAITING_FOR_AGENTS = "WaitingForAgents"
    INVALID_SPEC = "InvalidSpec"
    AGENT_TEMPLATE_INVALID = "AgentTemplateInvalid"
    RELEASING = "Releasing"
    RELEASE_STUCK = "ReleaseStuck"
    RELEASED = "Released"
    # Enforced
    CAPPED = "Capped"
    NO_CLOCK = "NoClock"
    # Progressing
    ROLLING_OUT = "RollingOut"
    ROLLOUT_PAUSED = "RolloutPaused"
    ROLLED_OUT = "RolledOut"
    UP_TO_DATE = "UpToDate"
    # GuardrailTripped
    BREACHED = "Breached"
    WITHIN_LIMITS = "WithinLimits"
    # ClockClamped
    BELOW_REQUEST = "BelowRequest"
    AS_REQUESTED = "AsRequested"
    NOT_OBSERVED = "NotObserved"
    # PowerCapBinding
    BINDING = "Binding"
    INERT = "Inert"
    UNKNOWN = "Unknown"
    # Conflict
    NO_CONFLICT = "NoConflict"
    # Verified
    NO_DECODE_POOL = "NoDecodePool"
    # Events alone
    TUNING_ARM = "TuningArm"
    TUNED = "Tuned"
    TUNING_ANEW = "TuningAnew"
    PROFILE_ROW = "ProfileRow"


class ConditionType(StrEnum):
    """Condition types of an EnergyPolicy."""

    READY = "Ready"
    ENFORCED = "Enforced"
    PROGRESSING = "Progressing"
    GUARDRAIL_TRIPPED = "GuardrailTripped"
    CLOCK_CLAMPED = "ClockClamped"
    POWER_CAP_BINDING = "PowerCapBinding"
    CONFLICT = "Conflict"
    VERIFIED = "Verified"


class SavingsVerdict(StrEnum):
    """What the experiment says about the saving."""

    VERIFIED = "Verified"
    INCONCLUSIVE = "Inconclusive"
    UNKNOWN = "Unknown"


class RolloutPhase(StrEnum):
    """Where the rollout of a clock stands."""

    PROGRESSING = "Progressing"
    PAUSED = "Paused"
    ROLLED_BACK = "RolledBack"
    COMPLETE = "Complete"


class RooflineVerdict(StrEnum):
    """What limits a pool, by its arithmetic intensity."""

    MEMORY_BOUND = "MemoryBound"
    COMPUTE_BOUND = "ComputeBound"
    UNKNOWN = "Unknown"


class PowerCapVerdict(StrEnum):
    """Whether the GPU's power limit held the clock down."""

    INERT = "Inert"
    BINDING = "Binding"
    UNKNOWN = "Unknown"
