"""Intercepts the attention calls of other libraries, by patching the functions that they call."""
