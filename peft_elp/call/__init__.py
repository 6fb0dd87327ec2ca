"""What happens during one forward pass: what the layers of one call share, and where the real frames are."""
