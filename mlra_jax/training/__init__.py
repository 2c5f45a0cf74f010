"""Training on a mesh: settings, optimizer, state, step, loop, metrics."""
