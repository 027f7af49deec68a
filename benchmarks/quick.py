"""The shortest benchmark: the MNIST one on scikit-learn's bundled digits, three seeds."""

from pathlib import Path

import torch

from benchmarks import mnist

if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(__file__).parent.parent / "runs" / "quick.json"
    # A quick run is there to be watched, so nothing of an earlier one is taken over.
    out.unlink(missing_ok=True)
    mnist.main(data="digits", seeds=3, epochs=10, batch=64, width=256, out=out)
