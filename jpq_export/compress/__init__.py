"""From a teacher model to a compressed one: load, statistics, search, prune, round, tune."""
