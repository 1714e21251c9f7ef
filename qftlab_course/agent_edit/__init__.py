"""Special-token training, whole: prompts for the two modes, rows by a teacher, the checker, and an offline teacher."""
