"""Optimizers: one recipe for each method, and the base class that does everything else."""
