"""Models and data sets that have grown apart: a set grows by `mme prepare --add-to`, a model continues on a larger set."""
