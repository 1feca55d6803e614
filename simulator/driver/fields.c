/* Field values and violation times: the counters of what held the clock down. */
#define _GNU_SOURCE
#include <time.h>

#include "driver.h"

#define ENERGY_READ_NS 4000000L
enum { TYPE_UINT = 1, TYPE_ULL = 3 };
enum { SCOPE_GPU = 0 };

static const uint32_t counter_fields[SIM_COUNTERS] = SIM_COUNTER_FIELDS;

static int64_t wall_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void put_uint(struct nvml_field_value *field, unsigned int value)
{
    field->value_type = TYPE_UINT;
    field->value.ui = value;
}

static void put_ull(struct nvml_field_value *field, unsigned long long value)
{
    field->value_type = TYPE_ULL;
    field->value.ull = value;
}

static void read_field(const struct sim_gpu *gpu, struct nvml_field_value *field)
{
    field->result = NVML_SUCCESS;
    field->value.ull = 0;
    for (int i = 0; i < SIM_COUNTERS; i++)
        if (counter_fields[i] == field->field_id) {
            put_ull(field, sim_read_sensors(gpu).counters_ns[i]);
            return;
        }
    bool has_scope = field->field_id >= 185 && field->field_id <= 192;
    if (has_scope && field->scope_id != SCOPE_GPU) {
        field->result = NVML_ERROR_NOT_SUPPORTED; /* no module with a CPU on this board */
        return;
    }
    switch (field->field_id) {
    case 83:
    case 191:
        sim_sleep_ns(ENERGY_READ_NS);
        put_ull(field, sim_read_sensors(gpu).energy_mj);
        break;
    case 185: put_uint(field, sim_read_sensors(gpu).power_average_mw); break;
    case 186: put_uint(field, sim_read_sensors(gpu).power_instant_mw); break;
    case 187: put_uint(field, gpu->identity.min_limit_mw); break;
    case 188: put_uint(field, gpu->identity.max_limit_mw); break;
    case 189: put_uint(field, gpu->identity.max_limit_mw); break;
    case 190: put_uint(field, gpu->request.power_limit_mw); break;
    case 192: put_uint(field, gpu->request.power_limit_mw); break;
    case 230: put_uint(field, gpu->condition.recovery_action); break;
    default: field->result = NVML_ERROR_NOT_SUPPORTED; break;
    }
}

NVML_API nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, struct nvml_field_value *fields)
{
    DEVICE_CALL("nvmlDeviceGetFieldValues", device);
    REQUIRE(fields != NULL && count > 0);
    for (int i = 0; i < count; i++) {
        int64_t start = wall_us();
        read_field(gpu, &fields[i]);
        fields[i].timestamp_us = wall_us();
        fields[i].latency_us = fields[i].timestamp_us - start;
    }
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetViolationStatus(nvmlDevice_t device, unsigned int policy, struct nvml_violation *out)
{
    DEVICE_CALL("nvmlDeviceGetViolationStatus", device);
    REQUIRE(out != NULL && (policy <= 5 || policy == 10)); /* 6-9 gave INVALID_ARGUMENT on Hopper (measured) */
    /* power, thermal, sync boost, board limit, low utilisation, reliability; 10 is total application clocks */
    int counter = policy == 10 ? 6 : (int)policy;
    out->reference_us = (unsigned long long)wall_us();
    out->violation_ns = sim_read_sensors(gpu).counters_ns[counter];
    return NVML_SUCCESS;
}
