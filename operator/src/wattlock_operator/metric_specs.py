"""The operator's metrics: what /metrics may hold. docs/metrics.md is generated from it.

No label names a pod or a GPU: those come and go by the thousand, and the agents tell of them.
"""

from wattlock_api.metricspec import MetricSpec

POLICY = ("namespace", "policy")
POOL = ("namespace", "policy", "pool", "role")

# --- the operator ---
OPERATOR_INFO = MetricSpec("wattlock_operator_info", "gauge", "", "Version of the operator; always 1", ("version",))
OPERATOR_LEADING = MetricSpec("wattlock_operator_leading", "gauge", "", "1 when this operator holds the lease")
OPERATOR_POLICIES = MetricSpec(
    "wattlock_operator_policies", "gauge", "", "Policies in the cluster; the oldest 1000 have series of their own"
)
OPERATOR_API_WRITES = MetricSpec(
    "wattlock_operator_api_writes_total", "counter", "", "Writes to the API server", ("kind", "verb")
)
OPERATOR_ERRORS = MetricSpec("wattlock_operator_errors_total", "counter", "", "Failures, by what failed", ("where",))
OPERATOR_PASS = MetricSpec(
    "wattlock_operator_pass_duration_seconds",
    "histogram",
    "seconds",
    "Time that one pass over the cluster took, decision and writes",
)

# --- policies ---
POLICY_INFO = MetricSpec(
    "wattlock_policy_info",
    "gauge",
    "",
    "Policies and their mode (Invalid where it cannot be read); always 1",
    (*POLICY, "mode"),
)
POLICY_CONDITION = MetricSpec(
    "wattlock_policy_condition",
    "gauge",
    "",
    "Conditions of a policy: 1 true, 0 false; one that is Unknown is absent",
    (*POLICY, "condition"),
)

# --- pools ---
POOL_GPUS = MetricSpec("wattlock_pool_gpus", "gauge", "", "GPUs that the pool's pods hold", POOL)
POOL_CAPPED = MetricSpec(
    "wattlock_pool_capped_gpus", "gauge", "", "GPUs under the cap or in one of its control epochs", POOL
)
POOL_LOCKED = MetricSpec(
    "wattlock_pool_locked_gpus",
    "gauge",
    "",
    "GPUs that are locked now; control epochs release some of the capped",
    POOL,
)
POOL_CLAMPED = MetricSpec(
    "wattlock_pool_clamped_gpus", "gauge", "", "GPUs below their cap under load while no limiter acts", POOL
)
POOL_INSTANCES = MetricSpec("wattlock_pool_instances", "gauge", "", "Serving instances", POOL)
POOL_POWER = MetricSpec(
    "wattlock_pool_power_watts", "gauge", "watts", "Power of the pool's GPU boards; absent unless all are known", POOL
)
POOL_REQUESTED_CLOCK = MetricSpec(
    "wattlock_pool_requested_sm_clock_hertz", "gauge", "hertz", "Cap in force (the lowest of the pool)", POOL
)
POOL_OBSERVED_CLOCK = MetricSpec(
    "wattlock_pool_observed_sm_clock_hertz",
    "gauge",
    "hertz",
    "SM clock of capped GPUs under load (the lowest of the pool)",
    POOL,
)
POOL_TOKENS = MetricSpec(
    "wattlock_pool_tokens_per_second", "gauge", "tokens per second", "Generated tokens per second", POOL
)
POOL_PROMPT_TOKENS = MetricSpec(
    "wattlock_pool_prompt_tokens_per_second",
    "gauge",
    "tokens per second",
    "Prompt tokens per second that the pool computed itself",
    POOL,
)
POOL_JOULES_PER_GENERATED_TOKEN = MetricSpec(
    "wattlock_pool_joules_per_generated_token",
    "gauge",
    "joules per token",
    "GPU-board energy for each generated token; absent in Prefill pools and without tokens",
    POOL,
)
POOL_JOULES_PER_PROMPT_TOKEN = MetricSpec(
    "wattlock_pool_joules_per_prompt_token",
    "gauge",
    "joules per token",
    "GPU-board energy for each computed prompt token; only in Prefill pools, absent without prompts",
    POOL,
)
POOL_ARITHMETIC_INTENSITY = MetricSpec(
    "wattlock_pool_arithmetic_intensity_flops_per_byte",
    "gauge",
    "FLOP per byte",
    "Operations for each byte moved to or from GPU memory, by the engines' own estimate; absent without it",
    POOL,
)
POOL_ROOFLINE = MetricSpec(
    "wattlock_pool_roofline",
    "gauge",
    "",
    "1 for what limits the pool by the roofline model: MemoryBound, ComputeBound or Unknown",
    (*POOL, "verdict"),
)
POOL_LATENCY = MetricSpec(
    "wattlock_pool_inter_token_latency_seconds", "gauge", "seconds", "Mean inter-token latency", POOL
)
POOL_ENERGY = MetricSpec(
    "wattlock_pool_energy_joules_total",
    "counter",
    "joules",
    "GPU-board energy of the pool since its policy was created",
    POOL,
)
POOL_POWER_CAP = MetricSpec(
    "wattlock_pool_power_cap",
    "gauge",
    "",
    "1 for the verdict on the boards' power limit: Inert, Binding or Unknown",
    (*POOL, "verdict"),
)

# --- tuners: pools with clock.tune ---
TUNING_STATE = MetricSpec(
    "wattlock_pool_tuning_state",
    "gauge",
    "",
    "1 for what the pool's tuner does: Starting, Searching, Confirming, CoolingDown, Settled, Released (nothing pays), "
    "or Resting (mode Observe)",
    (*POOL, "state"),
)
TUNING_ARM = MetricSpec(
    "wattlock_pool_tuning_arm", "gauge", "", "Number of the arm under test, from 1; only while a search goes on", POOL
)
TUNING_ARMS = MetricSpec(
    "wattlock_pool_tuning_most_arms",
    "gauge",
    "",
    "How many arms the search will have, at most; only while it goes on",
    POOL,
)
TUNING_CAP = MetricSpec(
    "wattlock_pool_tuning_cap_hertz",
    "gauge",
    "hertz",
    "The tuner's cap: under test, or chosen; absent while released",
    POOL,
)
TUNING_PAIRS = MetricSpec(
    "wattlock_pool_tuning_pairs", "gauge", "", "Pairs of epochs under the arms of the present or last search", POOL
)
TUNING_REMAINING = MetricSpec(
    "wattlock_pool_tuning_remaining_seconds",
    "gauge",
    "seconds",
    "Time that the search still takes, roughly; absent where nobody can tell",
    POOL,
)
TUNING_SEARCHES = MetricSpec(
    "wattlock_pool_tuning_searches_total",
    "counter",
    "",
    "Searches that began, by cause: First, WorkChanged, CostsEnergy or BrokeBound",
    (*POOL, "cause"),
)
TUNING_GUARDRAIL_ARMS = MetricSpec(
    "wattlock_pool_tuning_guardrail_arms_total",
    "counter",
    "",
    "Arms that were given up because the guardrail released half of the instances",
    POOL,
)

# --- savings ---
POOL_VERDICT = MetricSpec(
    "wattlock_pool_saving_verdict",
    "gauge",
    "",
    "1 for the verdict on the pool's saving: Verified, Inconclusive or Unknown",
    (*POOL, "verdict"),
)
SAVING_RATIO = MetricSpec(
    "wattlock_pool_saving_ratio",
    "gauge",
    "ratio, 0 to 1",
    "Measured saving of GPU-board energy for each token; negative where the cap costs energy",
    POOL,
)
SAVING_RATIO_LOW = MetricSpec(
    "wattlock_pool_saving_ratio_low", "gauge", "ratio, 0 to 1", "Lower end of the 95 % interval of the saving", POOL
)
SAVING_RATIO_HIGH = MetricSpec(
    "wattlock_pool_saving_ratio_high", "gauge", "ratio, 0 to 1", "Upper end of the 95 % interval of the saving", POOL
)
SAVING_RATIO_EVERY_LOOK_LOW = MetricSpec(
    "wattlock_pool_saving_ratio_every_look_low",
    "gauge",
    "ratio, 0 to 1",
    "Lower end of the wider interval that holds at all looks at once with 95 % probability",
    POOL,
)
SAVING_RATIO_EVERY_LOOK_HIGH = MetricSpec(
    "wattlock_pool_saving_ratio_every_look_high", "gauge", "ratio, 0 to 1", "Upper end of that interval", POOL
)
EVIDENCE = MetricSpec(
    "wattlock_pool_saving_evidence",
    "gauge",
    "",
    'Evidence against "the cap does nothing", good at every look (an e-value, at most 1e9): 20 is enough for Verified',
    POOL,
)
THROUGHPUT_CHANGE = MetricSpec(
    "wattlock_pool_throughput_change_ratio", "gauge", "ratio", "Change of tokens per second under the cap", POOL
)
LATENCY_CHANGE = MetricSpec(
    "wattlock_pool_inter_token_latency_change_ratio",
    "gauge",
    "ratio",
    "Change of the mean inter-token latency under the cap",
    POOL,
)
PAIRS = MetricSpec("wattlock_pool_experiment_pairs", "gauge", "", "Pairs of epochs behind the saving", POOL)
EXPERIMENT_INSTANCES = MetricSpec(
    "wattlock_pool_experiment_instances", "gauge", "", "Serving instances behind the saving", POOL
)
DROPPED = MetricSpec(
    "wattlock_pool_experiment_dropped_epochs", "gauge", "", "Epochs of the present instances that were not used", POOL
)
SAVED = MetricSpec(
    "wattlock_pool_saved_joules",
    "gauge",
    "joules",
    "GPU-board energy saved so far while verified; a gauge, because a cap that costs energy takes it down",
    POOL,
)
SAVED_LOW = MetricSpec(
    "wattlock_pool_saved_joules_low", "gauge", "joules", "Lower end of the 95 % interval of what was saved", POOL
)
SAVED_HIGH = MetricSpec(
    "wattlock_pool_saved_joules_high", "gauge", "joules", "Upper end of the 95 % interval of what was saved", POOL
)
SAVED_COST = MetricSpec(
    "wattlock_pool_saved_cost",
    "gauge",
    "your currency",
    "Money saved so far at the policy's price, with PUE where the policy gives it",
    POOL,
)
SAVED_COST_LOW = MetricSpec(
    "wattlock_pool_saved_cost_low", "gauge", "your currency", "Lower end of the 95 % interval of the money saved", POOL
)
SAVED_COST_HIGH = MetricSpec(
    "wattlock_pool_saved_cost_high", "gauge", "your currency", "Upper end of the 95 % interval of the money saved", POOL
)
SAVED_CO2 = MetricSpec(
    "wattlock_pool_saved_co2_grams",
    "gauge",
    "grams",
    "CO2 saved so far at the policy's carbon intensity, with PUE where the policy gives it",
    POOL,
)
SAVED_CO2_LOW = MetricSpec(
    "wattlock_pool_saved_co2_grams_low", "gauge", "grams", "Lower end of the 95 % interval of the CO2 saved", POOL
)
SAVED_CO2_HIGH = MetricSpec(
    "wattlock_pool_saved_co2_grams_high", "gauge", "grams", "Upper end of the 95 % interval of the CO2 saved", POOL
)

SPECS = tuple(value for value in list(globals().values()) if isinstance(value, MetricSpec))
"""In the order of this module."""
