"""The agent's metrics: what /metrics may hold. docs/metrics.md is generated from it."""

from wattlock_api.metricspec import MetricSpec

GPU = ("gpu", "index", "product", "namespace", "pod", "policy", "pool")
#: Prometheus sets a label ``instance`` of its own.
INSTANCE = ("namespace", "policy", "pool", "serving_instance")

# --- the agent ---
AGENT_INFO = MetricSpec(
    "wattlock_agent_info",
    "gauge",
    "",
    "Versions of the agent and of the driver; always 1",
    ("version", "driver_version"),
)
AGENT_CAN_WRITE = MetricSpec("wattlock_agent_can_write", "gauge", "", "1 when the agent may lock clocks")
AGENT_READY = MetricSpec("wattlock_agent_ready", "gauge", "", "1 when every order is in force or refused with a reason")
AGENT_ORDERS = MetricSpec("wattlock_agent_orders", "gauge", "", "Orders for this node")
AGENT_ORDERS_STALE = MetricSpec(
    "wattlock_agent_orders_stale",
    "gauge",
    "",
    "1 when orders are not followed because the API server or the operator are silent",
)
AGENT_LOOP_PASSES = MetricSpec("wattlock_agent_loop_passes_total", "counter", "", "Passes of the loop")
AGENT_LOOP_SECONDS = MetricSpec("wattlock_agent_loop_seconds_total", "counter", "seconds", "Time spent in passes")
AGENT_STATUS_WRITE_FAILURES = MetricSpec(
    "wattlock_agent_status_write_failures_total", "counter", "", "Reports that the API server did not take"
)
AGENT_DRIVER_ERRORS = MetricSpec(
    "wattlock_agent_driver_errors_total", "counter", "", "Driver calls that failed, by call and kind", ("call", "fault")
)
AGENT_SCRAPE_FAILURES = MetricSpec(
    "wattlock_agent_scrape_failures_total",
    "counter",
    "",
    "Serving metrics that could not be used, by reason",
    ("reason",),
)
AGENT_IDLE_RELEASES = MetricSpec(
    "wattlock_agent_idle_releases_total",
    "counter",
    "",
    "Idle instances whose lower cap was undone because a page showed work, or failed or came too late",
    ("cause",),
)
AGENT_IDLE_RELEASE_SECONDS = MetricSpec(
    "wattlock_agent_idle_release_seconds",
    "histogram",
    "seconds",
    "Time from the last page that showed no work until the driver had undone the lower cap: a request waited for less",
)

# --- GPUs of the node ---
GPU_POWER = MetricSpec(
    "wattlock_gpu_power_watts",
    "gauge",
    "watts",
    "Mean power of the board over the last 20 s, from its energy counter",
    GPU,
)
GPU_PEAK_POWER = MetricSpec(
    "wattlock_gpu_peak_power_watts",
    "gauge",
    "watts",
    "Highest instantaneous power of the board in its readings of the last 20 s",
    GPU,
)
GPU_POWER_LIMIT = MetricSpec("wattlock_gpu_power_limit_watts", "gauge", "watts", "Enforced power limit", GPU)
GPU_SM_CLOCK = MetricSpec("wattlock_gpu_sm_clock_hertz", "gauge", "hertz", "SM clock at the last reading", GPU)
GPU_REQUESTED_CLOCK = MetricSpec(
    "wattlock_gpu_requested_sm_clock_hertz",
    "gauge",
    "hertz",
    "Cap that is in force, or would be but for a control epoch",
    GPU,
)
GPU_OBSERVED_CLOCK = MetricSpec(
    "wattlock_gpu_observed_sm_clock_hertz",
    "gauge",
    "hertz",
    "Median SM clock while busy, of the last 20 s (under the cap, where one is asked for)",
    GPU,
)
GPU_CLAMPED = MetricSpec(
    "wattlock_gpu_clamped", "gauge", "", "1 when firmware holds the clock below the cap while no limiter acts", GPU
)
GPU_STATE = MetricSpec("wattlock_gpu_state", "gauge", "", "1 for the state that the GPU is in", (*GPU, "state"))
GPU_ENERGY = MetricSpec(
    "wattlock_gpu_energy_joules_total",
    "counter",
    "joules",
    "Energy of the board since it is tracked for its holder, from its energy counter",
    GPU,
)
GPU_ENERGY_GAPS = MetricSpec(
    "wattlock_gpu_energy_gaps_total",
    "counter",
    "",
    "Intervals that are not in the energy: agent, driver or GPU restarted, or the counter jumped",
    GPU,
)
GPU_BUSY = MetricSpec("wattlock_gpu_busy_seconds_total", "counter", "seconds", "Time with work", GPU)
GPU_CLAMP = MetricSpec("wattlock_gpu_clamp_seconds_total", "counter", "seconds", "Time clamped by firmware", GPU)
GPU_LIMITER = MetricSpec(
    "wattlock_gpu_limiter_seconds_total",
    "counter",
    "seconds",
    "Time for which a limiter held the clock down, from the driver's counters",
    (*GPU, "cause"),
)
GPU_CLOCK_WRITES = MetricSpec(
    "wattlock_gpu_clock_writes_total", "counter", "", "Locks and resets that the driver accepted", GPU
)

# --- serving instances, as far as they run on the node ---
INSTANCE_ENERGY = MetricSpec(
    "wattlock_instance_energy_joules_total", "counter", "joules", "Energy of the boards of the instance here", INSTANCE
)
INSTANCE_TOKENS = MetricSpec(
    "wattlock_instance_tokens_per_second",
    "gauge",
    "tokens per second",
    "Generated tokens per second over the last report interval",
    INSTANCE,
)
INSTANCE_PROMPT_TOKENS = MetricSpec(
    "wattlock_instance_prompt_tokens_per_second",
    "gauge",
    "tokens per second",
    "Prompt tokens per second that the instance computed itself, over the last report interval",
    INSTANCE,
)
INSTANCE_JOULES_PER_GENERATED_TOKEN = MetricSpec(
    "wattlock_instance_joules_per_generated_token",
    "gauge",
    "joules per token",
    "Energy of the boards for each generated token over the last report interval; absent without tokens",
    INSTANCE,
)
INSTANCE_JOULES_PER_PROMPT_TOKEN = MetricSpec(
    "wattlock_instance_joules_per_prompt_token",
    "gauge",
    "joules per token",
    "Energy of the boards for each computed prompt token over the last report interval; only in Prefill pools",
    INSTANCE,
)
INSTANCE_LATENCY = MetricSpec(
    "wattlock_instance_inter_token_latency_seconds",
    "gauge",
    "seconds",
    "Mean inter-token latency over the last report interval",
    INSTANCE,
)
INSTANCE_WAITING = MetricSpec(
    "wattlock_instance_waiting_requests", "gauge", "", "Requests that wait for a place in the batch", INSTANCE
)
INSTANCE_IDLE_CAPPED = MetricSpec(
    "wattlock_instance_idle_capped_seconds_total",
    "counter",
    "seconds",
    "Time under the lower cap of idle instances, since this agent began",
    INSTANCE,
)
GUARDRAIL_TRIPS = MetricSpec("wattlock_guardrail_trips_total", "counter", "", "Breaches of the guardrail", INSTANCE)
GUARDRAIL_TRIPPED = MetricSpec(
    "wattlock_guardrail_tripped", "gauge", "", "1 while the cool-down after a breach lasts", INSTANCE
)
EXPERIMENT_PAIRS = MetricSpec(
    "wattlock_experiment_pairs_total", "counter", "", "Pairs of epochs measured, over all caps", INSTANCE
)
EXPERIMENT_DROPPED = MetricSpec(
    "wattlock_experiment_dropped_epochs_total", "counter", "", "Epochs not used, by cause", (*INSTANCE, "cause")
)

SPECS = tuple(value for value in list(globals().values()) if isinstance(value, MetricSpec))
"""In the order of this module."""
