"""The parts of :mod:`tools.peer_suites`: one module for each suite of somebody else's."""
