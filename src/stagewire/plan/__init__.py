"""Which stage owns which layers: parses, splits and checks layer ranges. Pure; standard library only."""
