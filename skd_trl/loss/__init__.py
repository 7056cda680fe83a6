"""What the student learns from: divergence, gate and gradient, in chunks of positions."""
