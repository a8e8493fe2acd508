"""report.html: the page of a run and its charts."""
