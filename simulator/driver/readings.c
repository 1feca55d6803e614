/* Readings: everything a client can ask without changing the GPU. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "driver.h"

#define ENERGY_READ_NS 4000000L /* a read of the energy counter takes about 4 ms on Hopper (measured) */

#define UINT_READING(function, expression)                                 \
    NVML_API nvmlReturn_t function(nvmlDevice_t device, unsigned int *out) \
    {                                                                      \
        DEVICE_CALL(#function, device);                                    \
        REQUIRE(out != NULL);                                              \
        *out = (unsigned int)(expression);                                 \
        return NVML_SUCCESS;                                               \
    }

#define UNSUPPORTED_READING(function)                               \
    NVML_API nvmlReturn_t function(nvmlDevice_t device, void *out)  \
    {                                                               \
        DEVICE_CALL(#function, device);                             \
        (void)out;                                                  \
        return NVML_ERROR_NOT_SUPPORTED;                            \
    }

static nvmlReturn_t copy_text(char *out, unsigned int size, const char *text)
{
    REQUIRE(out != NULL);
    if (strlen(text) + 1 > size) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}

#define TEXT_READING(function, expression)                                       \
    NVML_API nvmlReturn_t function(nvmlDevice_t device, char *out, unsigned int size) \
    {                                                                            \
        DEVICE_CALL(#function, device);                                          \
        return copy_text(out, size, expression);                                 \
    }

TEXT_READING(nvmlDeviceGetName, gpu->identity.name)
TEXT_READING(nvmlDeviceGetUUID, gpu->identity.uuid)
TEXT_READING(nvmlDeviceGetSerial, gpu->identity.serial)
TEXT_READING(nvmlDeviceGetVbiosVersion, "96.00.A5.00.1A")
TEXT_READING(nvmlDeviceGetBoardPartNumber, "692-2G520-0282-001")

UINT_READING(nvmlDeviceGetMinorNumber, gpu->identity.index)
UINT_READING(nvmlDeviceGetPowerUsage, sim_read_sensors(gpu).power_average_mw)
UINT_READING(nvmlDeviceGetEnforcedPowerLimit, gpu->request.power_limit_mw)
UINT_READING(nvmlDeviceGetPowerManagementLimit, gpu->request.power_limit_mw)
UINT_READING(nvmlDeviceGetPowerManagementDefaultLimit, gpu->identity.max_limit_mw)
UINT_READING(nvmlDeviceGetPersistenceMode, gpu->request.persistence_mode)
UINT_READING(nvmlDeviceGetArchitecture, 9)
UINT_READING(nvmlDeviceGetComputeMode, 0)
UINT_READING(nvmlDeviceGetPerformanceState, 0)
UINT_READING(nvmlDeviceGetNumFans, 0)
UINT_READING(nvmlDeviceGetNumGpuCores, 16896)
UINT_READING(nvmlDeviceGetBrand, 14)
UINT_READING(nvmlDeviceGetDisplayMode, 0)
UINT_READING(nvmlDeviceGetDisplayActive, 0)
UINT_READING(nvmlDeviceGetVirtualizationMode, gpu->condition.virtualization_mode)
UINT_READING(nvmlDeviceGetMaxMigDeviceCount, 7)
UINT_READING(nvmlDeviceIsMigDeviceHandle, 0)

UNSUPPORTED_READING(nvmlDeviceGetFanSpeed)
UNSUPPORTED_READING(nvmlDeviceGetC2cModeInfoV)
UNSUPPORTED_READING(nvmlDeviceGetGpuOperationMode)
UNSUPPORTED_READING(nvmlDeviceGetGpuInstanceId)
UNSUPPORTED_READING(nvmlDeviceGetComputeInstanceId)

NVML_API nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, struct nvml_pci_info *out)
{
    DEVICE_CALL("nvmlDeviceGetPciInfo", device);
    REQUIRE(out != NULL);
    memset(out, 0, sizeof *out);
    out->bus = gpu->identity.pci_bus;
    out->device_id = strcmp(gpu->identity.product, "H100") == 0 ? 0x233010deu : 0x233510deu;
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "0000:%02X:00.0", out->bus & 0xffu);
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", out->bus & 0xffu);
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    DEVICE_CALL("nvmlDeviceGetCudaComputeCapability", device);
    REQUIRE(major != NULL && minor != NULL);
    *major = 9;
    *minor = 0;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending)
{
    DEVICE_CALL("nvmlDeviceGetMigMode", device);
    REQUIRE(current != NULL && pending != NULL);
    *current = gpu->condition.mig_current;
    *pending = gpu->condition.mig_pending;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned int index, nvmlDevice_t *out)
{
    DEVICE_CALL("nvmlDeviceGetMigDeviceHandleByIndex", device);
    (void)index;
    (void)out;
    return gpu->condition.mig_current ? NVML_ERROR_NOT_FOUND : NVML_ERROR_NOT_SUPPORTED;
}

/* ---- clocks ---- */
NVML_API nvmlReturn_t nvmlDeviceGetSupportedMemoryClocks(nvmlDevice_t device, unsigned int *count, unsigned int *out)
{
    DEVICE_CALL("nvmlDeviceGetSupportedMemoryClocks", device);
    REQUIRE(count != NULL);
    unsigned int room = out == NULL ? 0 : *count;
    *count = 2;
    if (room < 2) return NVML_ERROR_INSUFFICIENT_SIZE;
    out[0] = gpu->identity.memory_clocks_mhz[0];
    out[1] = gpu->identity.memory_clocks_mhz[1];
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetSupportedGraphicsClocks(nvmlDevice_t device, unsigned int memory_mhz,
                                                           unsigned int *count, unsigned int *out)
{
    DEVICE_CALL("nvmlDeviceGetSupportedGraphicsClocks", device);
    const struct sim_identity *limits = &gpu->identity;
    REQUIRE(count != NULL);
    if (memory_mhz != limits->memory_clocks_mhz[0] && memory_mhz != limits->memory_clocks_mhz[1]) return NVML_ERROR_NOT_FOUND;
    unsigned int room = out == NULL ? 0 : *count;
    unsigned int length = (limits->max_clock_mhz - limits->min_clock_mhz) / limits->clock_step_mhz + 1;
    *count = length;
    if (room < length) return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < length; i++) out[i] = limits->max_clock_mhz - i * limits->clock_step_mhz;
    return NVML_SUCCESS;
}

static nvmlReturn_t current_clock(const struct sim_gpu *gpu, unsigned int type, unsigned int *out)
{
    struct sim_sensors now = sim_read_sensors(gpu);
    REQUIRE(out != NULL && type <= CLOCK_VIDEO);
    *out = type == CLOCK_MEM ? now.memory_mhz : type == CLOCK_VIDEO ? now.video_mhz : now.sm_mhz;
    return NVML_SUCCESS;
}

static nvmlReturn_t highest_clock(const struct sim_gpu *gpu, unsigned int type, unsigned int *out)
{
    REQUIRE(out != NULL && type <= CLOCK_VIDEO);
    *out = type == CLOCK_MEM     ? gpu->identity.memory_clocks_mhz[0]
           : type == CLOCK_VIDEO ? 1545
                                 : gpu->identity.max_clock_mhz;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, unsigned int type, unsigned int *out)
{
    DEVICE_CALL("nvmlDeviceGetClockInfo", device);
    return current_clock(gpu, type, out);
}

NVML_API nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, unsigned int type, unsigned int *out)
{
    DEVICE_CALL("nvmlDeviceGetMaxClockInfo", device);
    return highest_clock(gpu, type, out);
}

NVML_API nvmlReturn_t nvmlDeviceGetClock(nvmlDevice_t device, unsigned int type, unsigned int id, unsigned int *out)
{
    DEVICE_CALL("nvmlDeviceGetClock", device);
    if (id == 0) return current_clock(gpu, type, out);
    REQUIRE(id <= 3);
    if (type == CLOCK_VIDEO || (type == CLOCK_MEM && id == 3)) return NVML_ERROR_NOT_SUPPORTED;
    return highest_clock(gpu, type, out);
}

static nvmlReturn_t static_clock(const char *function, nvmlDevice_t device, unsigned int type, bool memory, unsigned int *out)
{
    DEVICE_CALL(function, device);
    if (type == CLOCK_VIDEO || (type == CLOCK_MEM && !memory)) return NVML_ERROR_NOT_SUPPORTED;
    return highest_clock(gpu, type, out);
}

NVML_API nvmlReturn_t nvmlDeviceGetMaxCustomerBoostClock(nvmlDevice_t device, unsigned int type, unsigned int *out)
{
    return static_clock("nvmlDeviceGetMaxCustomerBoostClock", device, type, false, out);
}
NVML_API nvmlReturn_t nvmlDeviceGetApplicationsClock(nvmlDevice_t device, unsigned int type, unsigned int *out)
{
    return static_clock("nvmlDeviceGetApplicationsClock", device, type, true, out);
}
NVML_API nvmlReturn_t nvmlDeviceGetDefaultApplicationsClock(nvmlDevice_t device, unsigned int type, unsigned int *out)
{
    return static_clock("nvmlDeviceGetDefaultApplicationsClock", device, type, true, out);
}

static nvmlReturn_t event_reasons(nvmlDevice_t device, unsigned long long *out)
{
    DEVICE_CALL("nvmlDeviceGetCurrentClocksEventReasons", device);
    REQUIRE(out != NULL);
    if (gpu->condition.virtualization_mode == 2) return NVML_ERROR_NOT_SUPPORTED;
    *out = sim_read_sensors(gpu).reasons;
    return NVML_SUCCESS;
}
NVML_API nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long *out)
{
    return event_reasons(device, out);
}
NVML_API nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long *out)
{
    return event_reasons(device, out);
}

static nvmlReturn_t supported_reasons(nvmlDevice_t device, unsigned long long *out)
{
    DEVICE_CALL("nvmlDeviceGetSupportedClocksEventReasons", device);
    REQUIRE(out != NULL);
    *out = 0x1ff;
    return NVML_SUCCESS;
}
NVML_API nvmlReturn_t nvmlDeviceGetSupportedClocksEventReasons(nvmlDevice_t device, unsigned long long *out)
{
    return supported_reasons(device, out);
}
NVML_API nvmlReturn_t nvmlDeviceGetSupportedClocksThrottleReasons(nvmlDevice_t device, unsigned long long *out)
{
    return supported_reasons(device, out);
}

/* ---- power, energy, temperature, load, memory ---- */
NVML_API nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *out)
{
    DEVICE_CALL("nvmlDeviceGetTotalEnergyConsumption", device);
    REQUIRE(out != NULL);
    sim_sleep_ns(ENERGY_READ_NS);
    *out = sim_read_sensors(gpu).energy_mj;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned int *low, unsigned int *high)
{
    DEVICE_CALL("nvmlDeviceGetPowerManagementLimitConstraints", device);
    REQUIRE(low != NULL && high != NULL);
    *low = gpu->identity.min_limit_mw;
    *high = gpu->identity.max_limit_mw;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned int *out)
{
    DEVICE_CALL("nvmlDeviceGetTemperature", device);
    REQUIRE(out != NULL && sensor == 0);
    *out = sim_read_sensors(gpu).temperature_celsius;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, struct nvml_temperature *out)
{
    DEVICE_CALL("nvmlDeviceGetTemperature", device);
    REQUIRE(out != NULL && out->sensor == 0);
    out->celsius = (int)sim_read_sensors(gpu).temperature_celsius;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t device, unsigned int kind, unsigned int *out)
{
    static const unsigned int celsius[] = {95, 89, 95, 87}; /* shutdown, slowdown, memory, GPU: measured */
    DEVICE_CALL("nvmlDeviceGetTemperatureThreshold", device);
    REQUIRE(out != NULL);
    if (kind >= sizeof celsius / sizeof celsius[0]) return NVML_ERROR_NOT_SUPPORTED;
    *out = celsius[kind];
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, struct nvml_utilization *out)
{
    DEVICE_CALL("nvmlDeviceGetUtilizationRates", device);
    REQUIRE(out != NULL);
    if (gpu->condition.mig_current) return NVML_ERROR_NOT_SUPPORTED;
    struct sim_sensors now = sim_read_sensors(gpu);
    out->gpu = now.gpu_percent;
    out->memory = now.memory_percent;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, struct nvml_memory *out)
{
    DEVICE_CALL("nvmlDeviceGetMemoryInfo", device);
    REQUIRE(out != NULL);
    out->total = gpu->identity.memory_bytes;
    out->used = (unsigned long long)sim_read_sensors(gpu).memory_used_mib << 20;
    out->free = out->total - out->used;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, struct nvml_memory_v2 *out)
{
    DEVICE_CALL("nvmlDeviceGetMemoryInfo", device);
    REQUIRE(out != NULL);
    if (out->version != (sizeof *out | 2u << 24)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    out->total = gpu->identity.memory_bytes;
    out->reserved = 0;
    out->used = (unsigned long long)sim_read_sensors(gpu).memory_used_mib << 20;
    out->free = out->total - out->used;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, struct nvml_memory *out)
{
    DEVICE_CALL("nvmlDeviceGetBAR1MemoryInfo", device);
    REQUIRE(out != NULL);
    out->total = out->free = 256ull << 30;
    out->used = 0;
    return NVML_SUCCESS;
}

/* ---- processes: none is ever listed, for the serving engine holds no CUDA context ---- */
#define PROCESS_LIST(function, name)                                                           \
    NVML_API nvmlReturn_t function(nvmlDevice_t device, unsigned int *count, void *out)        \
    {                                                                                          \
        DEVICE_CALL(name, device);                                                             \
        (void)out;                                                                             \
        REQUIRE(count != NULL);                                                                \
        *count = 0;                                                                            \
        return NVML_SUCCESS;                                                                   \
    }
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v2, "nvmlDeviceGetComputeRunningProcesses")
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v3, "nvmlDeviceGetComputeRunningProcesses")
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, "nvmlDeviceGetGraphicsRunningProcesses")
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, "nvmlDeviceGetGraphicsRunningProcesses")
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, "nvmlDeviceGetMPSComputeRunningProcesses")
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, "nvmlDeviceGetMPSComputeRunningProcesses")

NVML_API nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, void *out, unsigned int *count,
                                                      unsigned long long since_us)
{
    DEVICE_CALL("nvmlDeviceGetProcessUtilization", device);
    (void)out;
    (void)since_us;
    REQUIRE(count != NULL);
    *count = 0;
    return NVML_ERROR_NOT_FOUND;
}

/* Video engines stand still. */
#define VIDEO_LOAD(function)                                                                           \
    NVML_API nvmlReturn_t function(nvmlDevice_t device, unsigned int *percent, unsigned int *period_us) \
    {                                                                                                  \
        DEVICE_CALL(#function, device);                                                                \
        REQUIRE(percent != NULL && period_us != NULL);                                                 \
        *percent = 0;                                                                                  \
        *period_us = 167000;                                                                           \
        return NVML_SUCCESS;                                                                           \
    }
VIDEO_LOAD(nvmlDeviceGetEncoderUtilization)
VIDEO_LOAD(nvmlDeviceGetDecoderUtilization)
