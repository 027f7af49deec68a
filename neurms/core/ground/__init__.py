"""What every other floor of core stands on, and what imports none of them."""
