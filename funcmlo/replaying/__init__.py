"""Inner steps and products by tapes: recorded, then made again by their operations alone."""
