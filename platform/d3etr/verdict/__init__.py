"""Is distilling worth it for this student, these data, these hours? Contenders at equal time."""
