"""Pure functions on arrays: schemes, packing, reference meaning of each operator, error measures."""
