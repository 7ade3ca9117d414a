"""A model as the passes see it: which layers can be replaced, in which order they run, and what flows through them."""
