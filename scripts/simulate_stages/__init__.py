"""A simulation of stage scheduling: where early exits pay on a large GPU, and where they do not.

Plain Python and numpy. What runs is a cost model (`cost.py`), not a model: see docs/simulation.md.
"""
