"""Muon and what it is made of: orthogonalisation, schedules, parameter routing. Plain PyTorch."""
