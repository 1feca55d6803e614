/* Versions and error texts. */
#include <string.h>

#include "driver.h"

static nvmlReturn_t version(const char *function, char *out, unsigned int size, const char *text)
{
    nvmlReturn_t result = sim_begin_system(function);
    if (result != NVML_SUCCESS) return result;
    REQUIRE(out != NULL);
    if (strlen(text) + 1 > size) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlSystemGetDriverVersion(char *out, unsigned int size)
{
    return version("nvmlSystemGetDriverVersion", out, size, "580.159.04");
}

NVML_API nvmlReturn_t nvmlSystemGetNVMLVersion(char *out, unsigned int size)
{
    return version("nvmlSystemGetNVMLVersion", out, size, "13.580.159.04");
}

NVML_API nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *out)
{
    nvmlReturn_t result = sim_begin_system("nvmlSystemGetCudaDriverVersion");
    if (result != NVML_SUCCESS) return result;
    REQUIRE(out != NULL);
    *out = 13000;
    return NVML_SUCCESS;
}
NVML_API nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *out) { return nvmlSystemGetCudaDriverVersion_v2(out); }

NVML_API const char *nvmlErrorString(nvmlReturn_t result)
{
    static const char *const texts[] = {
        "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions", "Already Initialized",
        "Not Found", "Insufficient Size", "Insufficient External Power", "Driver Not Loaded", "Timeout",
        "Interrupt Request Issue", "NVML Shared Library Not Found", "Function Not Found", "Corrupted infoROM", "GPU is lost",
        "GPU requires reset", "The operating system has blocked the request.", "Driver/library version mismatch",
        "In use by another client", "Insufficient memory", "No data", "The requested operation is not available on target device because ECC is enabled",
        "Insufficient resources", "Frequency not supported", "The provided version is invalid/unsupported",
        "The requested functionality has been deprecated", "The system is not ready for the request", "No GPUs found", "Invalid state"};
    if (result >= 0 && (size_t)result < sizeof texts / sizeof texts[0]) return texts[result];
    return "Unknown Error";
}
