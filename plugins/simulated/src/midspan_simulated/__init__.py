"""A simulated device for Midspan: right numbers, modelled time, faults on demand."""
