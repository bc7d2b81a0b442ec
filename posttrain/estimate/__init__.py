"""What a training run needs, from its settings and its model's config alone: memory, time, energy, disk."""
