"""Tinsmith: asynchronous, actor-based RL post-training of language models."""
