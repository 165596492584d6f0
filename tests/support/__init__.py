"""What the tests of real processes share: starting stages, talking to them, comparing answers."""
