"""Instruments: time, memory and FLOPs of a call, the peaks of GPUs, the throughput of a training run."""
