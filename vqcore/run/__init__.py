"""What a training run is: its state, a step, its players, its folder."""
