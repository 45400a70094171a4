"""A run's folder: recorded, resumed, swept and compared. Nothing here imports torch."""
