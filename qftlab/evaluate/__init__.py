"""Looking at data and at results: lengths, splits that do not leak, answers with intervals, pictures."""
