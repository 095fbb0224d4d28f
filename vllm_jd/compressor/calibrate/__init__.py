"""What inputs a layer sees, so that errors on them count."""
