"""What a layer's statistics say: rho, dominance, quantiles, and spans of time."""
