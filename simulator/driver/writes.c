/* The calls that change a GPU. Each one is logged, also when it is refused. */
#include <inttypes.h>
#include <stdio.h>

#include "driver.h"

#define SYMBOL_FIRST 0xffffff00u
#define SYMBOL_TDP 0xffffff01u
#define SYMBOL_UNLIMITED 0xffffff02u
#define TDP_CLOCK_MHZ 1590u /* what a lock "at TDP" means here; the real base clock of the board is not recorded */
#define VIRTUALIZATION_VGPU 2u

static nvmlReturn_t permitted(const struct sim_gpu *gpu)
{
    if (gpu->condition.virtualization_mode == VIRTUALIZATION_VGPU) return NVML_ERROR_NOT_SUPPORTED;
    return sim_writable() && sim_may_write() ? NVML_SUCCESS : NVML_ERROR_NO_PERMISSION;
}

static void store_word(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

/* Locked ranges: two clocks or two symbols; what no board could do is an invalid argument. */
static nvmlReturn_t resolve_range(const struct sim_identity *limits, unsigned int *low, unsigned int *high, bool *reset)
{
    *reset = false;
    if (*low >= SYMBOL_FIRST || *high >= SYMBOL_FIRST) {
        REQUIRE(*low == SYMBOL_TDP || *low == SYMBOL_UNLIMITED);
        REQUIRE(*high == SYMBOL_TDP || *high == SYMBOL_UNLIMITED);
        *reset = *low == SYMBOL_UNLIMITED && *high == SYMBOL_UNLIMITED;
        *low = *low == SYMBOL_TDP ? TDP_CLOCK_MHZ : limits->min_clock_mhz;
        *high = *high == SYMBOL_TDP ? TDP_CLOCK_MHZ : limits->max_clock_mhz;
        return NVML_SUCCESS;
    }
    REQUIRE(*low <= *high);
    REQUIRE(*high >= limits->min_clock_mhz && *high <= limits->max_clock_mhz);
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceSetGpuLockedClocks(nvmlDevice_t device, unsigned int low_mhz, unsigned int high_mhz)
{
    struct sim_gpu *gpu = NULL;
    unsigned int low = low_mhz, high = high_mhz;
    bool reset = false;
    nvmlReturn_t result = sim_begin("nvmlDeviceSetGpuLockedClocks", device, &gpu);
    if (result == NVML_SUCCESS) result = permitted(gpu);
    if (result == NVML_SUCCESS) result = resolve_range(&gpu->identity, &low, &high, &reset);
    if (result == NVML_SUCCESS)
        store_word(&gpu->request.lock_range_mhz, reset ? 0 : (uint64_t)low << 32 | high);
    if (gpu != NULL) {
        char arguments[48];
        snprintf(arguments, sizeof arguments, "%u, %u", low_mhz, high_mhz);
        sim_log_write("nvmlDeviceSetGpuLockedClocks", gpu->identity.uuid, arguments, result);
    }
    return result;
}

NVML_API nvmlReturn_t nvmlDeviceResetGpuLockedClocks(nvmlDevice_t device)
{
    struct sim_gpu *gpu = NULL;
    nvmlReturn_t result = sim_begin("nvmlDeviceResetGpuLockedClocks", device, &gpu);
    if (result == NVML_SUCCESS) result = permitted(gpu);
    if (result == NVML_SUCCESS) store_word(&gpu->request.lock_range_mhz, 0);
    if (gpu != NULL) sim_log_write("nvmlDeviceResetGpuLockedClocks", gpu->identity.uuid, "", result);
    return result;
}

NVML_API nvmlReturn_t nvmlDeviceSetMemoryLockedClocks(nvmlDevice_t device, unsigned int low_mhz, unsigned int high_mhz)
{
    struct sim_gpu *gpu = NULL;
    nvmlReturn_t result = sim_begin("nvmlDeviceSetMemoryLockedClocks", device, &gpu);
    if (result == NVML_SUCCESS) result = permitted(gpu);
    if (result == NVML_SUCCESS && (low_mhz > high_mhz || high_mhz < gpu->identity.memory_clocks_mhz[1]))
        result = NVML_ERROR_INVALID_ARGUMENT;
    if (result == NVML_SUCCESS) store_word(&gpu->request.memory_lock_range_mhz, (uint64_t)low_mhz << 32 | high_mhz);
    if (gpu != NULL) {
        char arguments[48];
        snprintf(arguments, sizeof arguments, "%u, %u", low_mhz, high_mhz);
        sim_log_write("nvmlDeviceSetMemoryLockedClocks", gpu->identity.uuid, arguments, result);
    }
    return result;
}

NVML_API nvmlReturn_t nvmlDeviceResetMemoryLockedClocks(nvmlDevice_t device)
{
    struct sim_gpu *gpu = NULL;
    nvmlReturn_t result = sim_begin("nvmlDeviceResetMemoryLockedClocks", device, &gpu);
    if (result == NVML_SUCCESS) result = permitted(gpu);
    if (result == NVML_SUCCESS) store_word(&gpu->request.memory_lock_range_mhz, 0);
    if (gpu != NULL) sim_log_write("nvmlDeviceResetMemoryLockedClocks", gpu->identity.uuid, "", result);
    return result;
}

/* The calls below share one shape: a number that is checked, stored and logged. */
static nvmlReturn_t store_number(const char *function, nvmlDevice_t device, unsigned int value, uint32_t *(*field)(struct sim_gpu *),
                                 bool (*valid)(const struct sim_gpu *, unsigned int))
{
    struct sim_gpu *gpu = NULL;
    nvmlReturn_t result = sim_begin(function, device, &gpu);
    if (result == NVML_SUCCESS) result = permitted(gpu);
    if (result == NVML_SUCCESS && !valid(gpu, value)) result = NVML_ERROR_INVALID_ARGUMENT;
    if (result == NVML_SUCCESS) __atomic_store_n(field(gpu), value, __ATOMIC_RELEASE);
    if (gpu != NULL) {
        char arguments[16];
        snprintf(arguments, sizeof arguments, "%u", value);
        sim_log_write(function, gpu->identity.uuid, arguments, result);
    }
    return result;
}

static uint32_t *limit_field(struct sim_gpu *gpu) { return &gpu->request.power_limit_mw; }
static uint32_t *persistence_field(struct sim_gpu *gpu) { return &gpu->request.persistence_mode; }
static uint32_t *mig_field(struct sim_gpu *gpu) { return &gpu->condition.mig_pending; }
static bool limit_valid(const struct sim_gpu *gpu, unsigned int mw)
{
    return mw >= gpu->identity.min_limit_mw && mw <= gpu->identity.max_limit_mw;
}
static bool switch_valid(const struct sim_gpu *gpu, unsigned int value)
{
    (void)gpu;
    return value <= 1;
}

NVML_API nvmlReturn_t nvmlDeviceSetPowerManagementLimit(nvmlDevice_t device, unsigned int limit_mw)
{
    return store_number("nvmlDeviceSetPowerManagementLimit", device, limit_mw, limit_field, limit_valid);
}

NVML_API nvmlReturn_t nvmlDeviceSetPersistenceMode(nvmlDevice_t device, unsigned int mode)
{
    return store_number("nvmlDeviceSetPersistenceMode", device, mode, persistence_field, switch_valid);
}

NVML_API nvmlReturn_t nvmlDeviceSetMigMode(nvmlDevice_t device, unsigned int mode, nvmlReturn_t *activation)
{
    REQUIRE(activation != NULL);
    *activation = NVML_SUCCESS;
    return store_number("nvmlDeviceSetMigMode", device, mode, mig_field, switch_valid);
}
