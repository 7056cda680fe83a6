"""What the trainers need beside sampling, loss and data: models, engines, metrics, what is kept for people."""
