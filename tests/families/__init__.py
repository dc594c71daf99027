"""Tests of every registered family of attention modules, on the real module of its library."""
