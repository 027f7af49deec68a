"""Fisher structures: one file for each way of approximating a layer's Fisher matrix."""
