"""A trained network in use: as a function of one image, and as a graph for other runtimes."""
