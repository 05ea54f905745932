"""Operators know faces but not machines: Arrow and NumPy in, Arrow and NumPy out, no Ray and no configuration files."""
