/* Sessions: maps the state file beside the library, hands out device handles, applies injected faults.
 *
 * The state file lies in the library's own directory, as found by dladdr, or in WATTLOCK_SIMULATOR_DIR. A missing file
 * is a driver that is not loaded. Without write access the library maps it read-only and serves readings only.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "driver.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned int references;
static struct sim_state *state; /* mapped once, never unmapped: late readers must not fault */
static bool writable;
static uint32_t session_generation;
static char directory[PATH_MAX];
static struct sim_handle handles[SIM_MAX_GPUS];
static uint32_t visible[SIM_MAX_GPUS];
static uint32_t visible_count;

void sim_sleep_ns(long nanoseconds)
{
    struct timespec wait = {nanoseconds / 1000000000L, nanoseconds % 1000000000L};
    while (nanosleep(&wait, &wait) != 0) {
    }
}

const char *sim_directory(void) { return directory; }

bool sim_writable(void) { return writable; }

static void find_directory(void)
{
    const char *chosen = getenv("WATTLOCK_SIMULATOR_DIR");
    if (chosen != NULL && chosen[0] != '\0') {
        snprintf(directory, sizeof directory, "%s", chosen);
        return;
    }
    Dl_info self;
    char path[PATH_MAX];
    if (dladdr((void *)&find_directory, &self) == 0 || realpath(self.dli_fname, path) == NULL) {
        snprintf(directory, sizeof directory, ".");
        return;
    }
    char *slash = strrchr(path, '/');
    if (slash != NULL) *slash = '\0';
    snprintf(directory, sizeof directory, "%s", path);
}

static nvmlReturn_t map_state(void)
{
    if (state == NULL) {
        char path[PATH_MAX + 16];
        find_directory();
        snprintf(path, sizeof path, "%s/state.bin", directory);
        int file = open(path, O_RDWR | O_CLOEXEC);
        bool may_write = file >= 0;
        if (!may_write) file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0) return NVML_ERROR_DRIVER_NOT_LOADED;
        struct stat found;
        if (fstat(file, &found) != 0 || found.st_size < (off_t)sizeof(struct sim_state)) {
            close(file);
            return NVML_ERROR_DRIVER_NOT_LOADED;
        }
        int protection = may_write ? PROT_READ | PROT_WRITE : PROT_READ;
        void *mapped = mmap(NULL, sizeof(struct sim_state), protection, MAP_SHARED, file, 0);
        close(file);
        if (mapped == MAP_FAILED) return NVML_ERROR_UNKNOWN;
        if (((struct sim_state *)mapped)->magic != SIM_MAGIC) {
            munmap(mapped, sizeof(struct sim_state));
            return NVML_ERROR_DRIVER_NOT_LOADED;
        }
        state = mapped;
        writable = may_write;
    }
    if (state->version != SIM_VERSION || state->size != sizeof(struct sim_state)) return NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    return NVML_SUCCESS;
}

/* NVIDIA_VISIBLE_DEVICES, as the container toolkit reads it: absent or "all", "none"/"void", or UUIDs and indices. */
static void find_visible(void)
{
    uint32_t count = state->gpu_count < SIM_MAX_GPUS ? state->gpu_count : SIM_MAX_GPUS;
    const char *wanted = getenv("NVIDIA_VISIBLE_DEVICES");
    visible_count = 0;
    if (wanted == NULL || wanted[0] == '\0' || strcmp(wanted, "all") == 0) {
        while (visible_count < count) {
            visible[visible_count] = visible_count;
            visible_count++;
        }
        return;
    }
    for (uint32_t slot = 0; slot < count; slot++) {
        char index[12];
        snprintf(index, sizeof index, "%u", slot);
        const char *cursor = wanted;
        while (*cursor != '\0') {
            size_t length = strcspn(cursor, ",");
            const char *uuid = state->gpus[slot].identity.uuid;
            if ((strlen(uuid) == length && strncmp(cursor, uuid, length) == 0) ||
                (strlen(index) == length && strncmp(cursor, index, length) == 0)) {
                visible[visible_count++] = slot;
                break;
            }
            cursor += length + (cursor[length] == ',');
        }
    }
}

static bool matches(const struct sim_fault *fault, const char *function)
{
    return strncmp(fault->function, function, sizeof fault->function) == 0 ||
           (strcmp(fault->function, "*") == 0 && strcmp(function, "nvmlInit") != 0);
}

static nvmlReturn_t apply_faults(struct sim_fault *faults, const char *function)
{
    for (int i = 0; i < SIM_MAX_FAULTS; i++) {
        struct sim_fault *fault = &faults[i];
        int32_t remaining = __atomic_load_n(&fault->remaining, __ATOMIC_ACQUIRE);
        if (remaining == 0 || !matches(fault, function)) continue;
        uint32_t code = fault->code, delay_ms = fault->delay_ms;
        /* A read-only mapping cannot count: there a counted fault lasts until it is cleared. */
        while (writable && remaining > 0) {
            if (__atomic_compare_exchange_n(&fault->remaining, &remaining, remaining - 1, false, __ATOMIC_ACQ_REL,
                                            __ATOMIC_ACQUIRE))
                break;
        }
        if (remaining == 0) continue; /* another caller took the last one */
        if (delay_ms > 0) sim_sleep_ns((long)delay_ms * 1000000L);
        if (code != NVML_SUCCESS) return (nvmlReturn_t)code;
    }
    return NVML_SUCCESS;
}

static nvmlReturn_t initialize(void)
{
    pthread_mutex_lock(&lock);
    nvmlReturn_t result = map_state();
    if (result == NVML_SUCCESS) result = apply_faults(state->faults, "nvmlInit");
    if (result == NVML_SUCCESS) {
        if (references == 0) {
            session_generation = state->session_generation;
            find_visible();
            for (uint32_t slot = 0; slot < SIM_MAX_GPUS; slot++) handles[slot].slot = slot;
        }
        references++;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

NVML_API nvmlReturn_t nvmlInit(void) { return initialize(); }
NVML_API nvmlReturn_t nvmlInit_v2(void) { return initialize(); }
NVML_API nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    return initialize();
}

NVML_API nvmlReturn_t nvmlShutdown(void)
{
    nvmlReturn_t result = NVML_ERROR_UNINITIALIZED;
    pthread_mutex_lock(&lock);
    if (references > 0) {
        references--;
        result = NVML_SUCCESS;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t sim_begin_system(const char *function)
{
    if (__atomic_load_n(&references, __ATOMIC_ACQUIRE) == 0) return NVML_ERROR_UNINITIALIZED;
    /* A driver reload that kills sessions: everything fails until the client initialises anew. */
    if (state->session_generation != session_generation) return NVML_ERROR_GPU_IS_LOST;
    return apply_faults(state->faults, function);
}

nvmlReturn_t sim_begin(const char *function, nvmlDevice_t device, struct sim_gpu **gpu)
{
    nvmlReturn_t result = sim_begin_system(function);
    if (result != NVML_SUCCESS) return result;
    if (device < handles || device >= handles + SIM_MAX_GPUS || device->slot >= state->gpu_count)
        return NVML_ERROR_INVALID_ARGUMENT;
    *gpu = &state->gpus[device->slot];
    return apply_faults((*gpu)->faults, function);
}

/* A consistent copy of the sensors. A node process that died while writing must not hang its readers: bounded. */
struct sim_sensors sim_read_sensors(const struct sim_gpu *gpu)
{
    struct sim_sensors copy;
    for (int attempt = 0; attempt < 1000; attempt++) {
        uint32_t before = __atomic_load_n(&gpu->sensors.sequence, __ATOMIC_ACQUIRE);
        memcpy(&copy, &gpu->sensors, sizeof copy);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        uint32_t after = __atomic_load_n(&gpu->sensors.sequence, __ATOMIC_RELAXED);
        if (before == after && (before & 1u) == 0) return copy;
        sched_yield();
    }
    return copy;
}

/* ---- devices ---- */
NVML_API nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count)
{
    nvmlReturn_t result = sim_begin_system("nvmlDeviceGetCount");
    if (result != NVML_SUCCESS) return result;
    REQUIRE(count != NULL);
    *count = visible_count;
    return NVML_SUCCESS;
}
NVML_API nvmlReturn_t nvmlDeviceGetCount(unsigned int *count) { return nvmlDeviceGetCount_v2(count); }

static nvmlReturn_t give_handle(const char *function, uint32_t slot, nvmlDevice_t *device)
{
    struct sim_gpu *gpu = NULL;
    nvmlReturn_t result = sim_begin(function, &handles[slot], &gpu);
    if (result == NVML_SUCCESS) *device = &handles[slot];
    return result;
}

NVML_API nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device)
{
    if (__atomic_load_n(&references, __ATOMIC_ACQUIRE) == 0) return NVML_ERROR_UNINITIALIZED;
    REQUIRE(device != NULL && index < visible_count);
    return give_handle("nvmlDeviceGetHandleByIndex", visible[index], device);
}
NVML_API nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned int index, nvmlDevice_t *device)
{
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

NVML_API nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    if (__atomic_load_n(&references, __ATOMIC_ACQUIRE) == 0) return NVML_ERROR_UNINITIALIZED;
    REQUIRE(uuid != NULL && device != NULL);
    for (uint32_t i = 0; i < visible_count; i++)
        if (strcmp(state->gpus[visible[i]].identity.uuid, uuid) == 0)
            return give_handle("nvmlDeviceGetHandleByUUID", visible[i], device);
    return NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *device)
{
    unsigned int domain = 0, bus = 0;
    if (__atomic_load_n(&references, __ATOMIC_ACQUIRE) == 0) return NVML_ERROR_UNINITIALIZED;
    REQUIRE(bus_id != NULL && device != NULL);
    REQUIRE(sscanf(bus_id, "%x:%x:", &domain, &bus) == 2);
    for (uint32_t i = 0; i < visible_count; i++)
        if (state->gpus[visible[i]].identity.pci_bus == bus)
            return give_handle("nvmlDeviceGetHandleByPciBusId", visible[i], device);
    return NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned int *index)
{
    DEVICE_CALL("nvmlDeviceGetIndex", device);
    REQUIRE(index != NULL);
    for (uint32_t i = 0; i < visible_count; i++)
        if (visible[i] == gpu->identity.index) {
            *index = i;
            return NVML_SUCCESS;
        }
    return NVML_ERROR_NOT_FOUND;
}
