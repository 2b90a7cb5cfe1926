"""Which facts will resist unlearning, and how well that can be known beforehand.

`scoring.score_facts` is the front door; `validation.validate` says how far its scores can be trusted on a model.
"""
