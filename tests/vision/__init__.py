"""Tests that need timm and torchvision."""
