"""Muon and its parts: orthogonalization, Newton-Schulz schedules, parameter routing."""
