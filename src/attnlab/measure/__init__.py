"""Instruments: time, memory and FLOPs of a call, the peak rates of GPUs, the throughput of a training run."""
