"""The report of a run, report.html, and comparisons of runs."""
