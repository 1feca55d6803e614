"""A simulated GPU node for people without GPUs."""
