"""A report in one form each: text, Markdown, LaTeX, CSV, HTML."""
