"""``python -m bench --device cuda``: linear layers on a GPU against dense torch; without one, a model of two GPUs."""
