"""See `torchvision`."""

ImageReadMode = decode_image = None
