"""The microcosm: one-line Python problems, completions to them, and a base model made on the spot.

tasks.py has the problems, texts.py what a policy may write about them and the pairs, base.py the model.
"""
