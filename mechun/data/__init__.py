"""Facts, from whatever file or data set they come, and as the token tensors that a model reads."""
