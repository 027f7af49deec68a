"""Training on several ranks: sharded parameters, uneven inputs."""
