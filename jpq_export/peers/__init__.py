"""Other people's quantizers as rows of `compare`, each in a process of its own (`pip install '.[peers]'`)."""
