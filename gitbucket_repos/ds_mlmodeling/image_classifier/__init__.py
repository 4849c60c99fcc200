"""The code that a model artifact carries: decode → transform → predict → encode, embed and explain.

Training, evaluation, serving and drift all import this one package, so they cannot disagree. It imports
only airloom.contract, torch, numpy and Pillow, and everything at module level (see `load_predictor`).
"""
