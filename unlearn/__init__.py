"""Objectives of LLM unlearning, and what training them and measuring them needs.

The package knows no YAML, no data set and no script: it never imports a top-level file.
"""
