"""What an index learns from a sample: a centre, principal axes, and how many bits each axis gets."""
