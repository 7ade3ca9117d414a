"""Which codes a weight gets: methods that look at the inputs that it multiplies, and what they fall back to."""
