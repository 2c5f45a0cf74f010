"""Text to tokens: tokenizers, token files, sources, and the Grain pipeline over them.

Only `pipeline` imports Grain, so that decoding runs on hosts without it.
"""
