"""Drafting: who proposes tokens, and with what."""
