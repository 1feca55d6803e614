"""Messages of the kubelet's device plugin API. Regenerate: ``python -m wattlock_simulator.proto.generate``."""
