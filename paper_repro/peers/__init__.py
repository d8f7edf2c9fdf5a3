"""Time, memory and error of hypergradients: this library beside every peer, in one run.

Nothing is imported here: each contender's process should hold its own library and no more (`run.EXPERIMENT` has the rest).
"""
