"""The methods: layouts, taps, statistics, structures, safeguards, routing and optimizers."""
