//! Boxes and reshapes against plain index arithmetic.
