"""What needs timm and torchvision."""
