/* Internals of the simulated NVML library: types of the NVML ABI that it serves, and its own helpers. */
#ifndef WATTLOCK_DRIVER_H
#define WATTLOCK_DRIVER_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "state_layout.h"

#define NVML_API __attribute__((visibility("default")))

/* ---- NVML ABI: names and values as in NVIDIA's nvml.h ---- */
typedef int nvmlReturn_t;
typedef struct sim_handle *nvmlDevice_t;

enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
    NVML_ERROR_UNKNOWN = 999
};

enum { CLOCK_GRAPHICS = 0, CLOCK_SM = 1, CLOCK_MEM = 2, CLOCK_VIDEO = 3 };

struct nvml_pci_info {
    char bus_id_legacy[16];
    unsigned int domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};
struct nvml_utilization { unsigned int gpu, memory; };
struct nvml_memory { unsigned long long total, free, used; };
struct nvml_memory_v2 { unsigned int version; unsigned long long total, reserved, free, used; };
struct nvml_temperature { unsigned int version; int sensor; int celsius; };
struct nvml_violation { unsigned long long reference_us, violation_ns; };
union nvml_value { double d; unsigned int ui; unsigned long long ull; };
struct nvml_field_value {
    uint32_t field_id, scope_id;
    int64_t timestamp_us, latency_us;
    int32_t value_type, result;
    union nvml_value value;
};
_Static_assert(sizeof(struct nvml_pci_info) == 68, "nvmlPciInfo_t");
_Static_assert(sizeof(struct nvml_memory_v2) == 40, "nvmlMemory_v2_t");
_Static_assert(sizeof(struct nvml_field_value) == 40, "nvmlFieldValue_t");

#pragma GCC visibility push(hidden)

struct sim_handle { uint32_t slot; };

/* session.c: the mapped state, handles, injected faults */
nvmlReturn_t sim_begin(const char *function, nvmlDevice_t device, struct sim_gpu **gpu);
nvmlReturn_t sim_begin_system(const char *function);
bool sim_writable(void);
const char *sim_directory(void);
struct sim_sensors sim_read_sensors(const struct sim_gpu *gpu);
void sim_sleep_ns(long nanoseconds);

/* audit.c: who may write, and who wrote */
bool sim_may_write(void);
void sim_log_write(const char *function, const char *uuid, const char *arguments, nvmlReturn_t result);

#pragma GCC visibility pop

/* Opens a call on a device: checks session, handle and faults, and gives `gpu`. */
#define DEVICE_CALL(function, device)                                   \
    struct sim_gpu *gpu = NULL;                                         \
    do {                                                                \
        nvmlReturn_t refused = sim_begin(function, device, &gpu);       \
        if (refused != NVML_SUCCESS) return refused;                    \
    } while (0)

#define REQUIRE(condition) \
    do { if (!(condition)) return NVML_ERROR_INVALID_ARGUMENT; } while (0)

#endif
