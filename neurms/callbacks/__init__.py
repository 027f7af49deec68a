"""Callbacks and the profiler, for Lightning, Keras and plain loops."""
