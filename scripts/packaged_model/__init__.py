"""Trains the small language model that Exeunt ships with: corpus, tokenizer, training, export, model card.

Run it as ``python -m scripts.packaged_model --help`` from the root of the repository.
"""
