"""Pure functions of arrays, for one transition; callers map them over batches."""
