"""Muon and what it stands on: orthogonalisation, schedules, routing, sharding. Plain PyTorch."""
