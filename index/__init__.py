"""Row storage: the N2O index, its arena, the scoring kernels, and user histories. Knows no model and no transport."""
