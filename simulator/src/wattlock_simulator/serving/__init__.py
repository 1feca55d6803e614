"""A simulated serving engine: the workload it puts on its GPUs and the metrics it shows."""
