"""Objectives of LLM unlearning, and what training them and measuring them needs.

A room imports those before it, and itself, only: io < models < objectives < passes < training, geffect, scores; and
reporting, which stands on io alone. No room knows YAML, a data set or a script.
"""
