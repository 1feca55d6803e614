"""Which pod holds which GPU, from the kubelet."""
