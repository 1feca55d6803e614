"""GPUs: what can be read and written, and the NVML adapter that does it."""
