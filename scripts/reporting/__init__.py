"""`report.html`: what a run, two runs or a study found, on one page that needs nothing but a browser."""
