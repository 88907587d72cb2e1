"""The report of a comparison: its text and tables, its figures, its page and their folder."""
