"""What a command means where it is told nothing; apart, so that looking at a study does not load what trains one."""

STUDY = "quick"
STORAGE = "sqlite:///nas.db"
