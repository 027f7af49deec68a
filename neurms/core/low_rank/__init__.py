"""The low-rank extension: any structure in a tracked, switched, compensated subspace."""
