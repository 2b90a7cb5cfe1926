"""The dictionaries of one model: sparse autoencoders, on SAELens. Knows nothing of facts, files or screens."""
