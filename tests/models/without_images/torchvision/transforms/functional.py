"""See `torchvision`."""

pil_to_tensor = None
