"""The commands of `mechun`: thin functions over the public ones, with one way of speaking and of failing."""
