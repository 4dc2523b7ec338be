"""How good features are: splits, probes and their scores."""
