"""Experiments on rendered or real data: demo, comparison of methods, ablations, benchmarks."""
