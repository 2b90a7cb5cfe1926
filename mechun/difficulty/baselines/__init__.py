"""The competitors of CUD: what can be measured per fact without unlearning anything.

Plain functions on a Hugging Face model and encoded facts, one file per family. Their results are raw; which way each
points, and what it costs, stands in the table `mechun.difficulty.signals.SIGNALS`.
"""
