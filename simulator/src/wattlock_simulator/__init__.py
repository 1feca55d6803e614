"""A simulated GPU node: NVML driver library, LLM serving and device plugin for machines without GPUs."""
