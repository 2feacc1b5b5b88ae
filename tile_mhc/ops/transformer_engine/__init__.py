"""The operators behind `compat.transformer_engine`, and `reference`, their specification."""
