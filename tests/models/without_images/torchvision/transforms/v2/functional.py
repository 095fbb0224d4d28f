"""See `torchvision`."""

from torchvision.transforms import InterpolationMode  # noqa: F401
