"""Which stage owns which layers: parse, split, validate. Pure; standard library only."""
